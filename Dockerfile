# One image for both programs (and for the simulated shop of docker-compose.yml).
#   docker build -t streamscore .                                        for a CPU
#   docker build -t streamscore:cuda --build-arg TORCH_BACKEND=cu128 .   for an NVIDIA GPU; run it with --gpus all

FROM python:3.12-slim AS build
# uv, because it knows where PyTorch keeps its wheels: pip would need an address, and without one takes those with 3 GB of CUDA libraries.
# The CUDA wheels bring these libraries along, so the base image stays the same and the host needs a driver only.
RUN pip install --no-cache-dir "uv>=0.9" && python -m venv /venv
ENV VIRTUAL_ENV=/venv UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1
# cpu, cu128, ... (uv pip install --help lists them); empty: what the index at hand has. A mirror: --build-arg UV_DEFAULT_INDEX=...
ARG TORCH_BACKEND=cpu
ARG UV_DEFAULT_INDEX
WORKDIR /src
# Dependencies in a layer of their own: it is by far the largest, and is built anew only when they change.
COPY pyproject.toml ./
RUN uv pip install ${TORCH_BACKEND:+--torch-backend=$TORCH_BACKEND} -r pyproject.toml
COPY . .
RUN uv pip install --no-deps .

FROM python:3.12-slim
# A new volume takes over the owner of the folder that it covers: without these, only root could write to it.
RUN useradd --uid 10001 --no-create-home streamscore && install -d -o streamscore -g streamscore /data /data/registry /data/log
COPY --from=build /venv /venv
# The user has no home, where matplotlib would keep what it knows of fonts.
ENV PATH=/venv/bin:$PATH MPLCONFIGDIR=/tmp/matplotlib
USER 10001
WORKDIR /data
# No HEALTHCHECK here: which port has /healthz depends on the program. docker-compose.yml and deploy/kubernetes/ have theirs.
ENTRYPOINT ["python", "-m"]
CMD ["worker", "run"]
