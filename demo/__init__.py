"""The demo: embedded Kafka and Redis, a simulated shop, and a live view of the real worker and trainer."""
