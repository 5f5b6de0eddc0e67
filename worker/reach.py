"""Why a client cannot get to work at a Kafka broker: kafka-python says no more than that it cannot."""

from __future__ import annotations

import socket
import ssl

from worker.settings import WorkerSettings

PROBE_SECONDS = 2.0


def why_not(server: str, settings: WorkerSettings) -> str:
    """A sentence about `server` ("host:port"), found by trying it step by step."""
    host, _, port = server.rpartition(":")
    if not host.strip("[]") or not port.isdigit() or int(port) > 65535:
        return f"{server!r} in kafka_bootstrap_servers is not host:port"
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS)
    except socket.gaierror:
        return f"{server}: no such host: correct kafka_bootstrap_servers"
    except TimeoutError:
        return f"{server} does not answer: is it up, and does a firewall let this machine through?"
    except OSError as error:
        return f"{server}: {error.strerror}: is Kafka up, and kafka_bootstrap_servers right?"
    with connection:
        if settings.kafka_security_protocol in ("SSL", "SASL_SSL") and (sentence := _why_no_tls(host, connection, settings)):
            return f"{server}: {sentence}"
    if settings.kafka_security_protocol.startswith("SASL"):
        return (
            f"{server} takes connections but not this login: check kafka_sasl_username and kafka_sasl_password, kafka_sasl_mechanism, and "
            f"whether that listener speaks {settings.kafka_security_protocol}"
        )
    return (
        f"{server} takes connections but does not talk {settings.kafka_security_protocol}: check kafka_security_protocol (does that "
        f"listener want TLS or a login?)"
    )


def _why_no_tls(host: str, connection: socket.socket, settings: WorkerSettings) -> str:
    try:
        context = ssl.create_default_context(cafile=settings.kafka_ssl_cafile)
    except (OSError, ssl.SSLError) as error:
        return f"kafka_ssl_cafile {settings.kafka_ssl_cafile} is no PEM file of certificates: {error.strerror or error}"
    try:
        if settings.kafka_ssl_certfile:
            password = settings.kafka_ssl_password
            context.load_cert_chain(
                settings.kafka_ssl_certfile, settings.kafka_ssl_keyfile, password.get_secret_value() if password else ""
            )
    except (OSError, ssl.SSLError) as error:
        return f"kafka_ssl_certfile and kafka_ssl_keyfile cannot be used: {error.strerror or error}; check them and kafka_ssl_password"
    try:
        context.wrap_socket(connection, server_hostname=host.strip("[]")).close()
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not trusted ({error.verify_message}): set kafka_ssl_cafile to the authority that signed it"
    except ssl.SSLError as error:
        return f"no TLS there ({error.reason}): check kafka_security_protocol and the port"
    except OSError as error:
        return f"no TLS there ({error}): check kafka_security_protocol and the port"
    return ""
