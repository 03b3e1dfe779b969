# Modelyard in a container: `docker build --target cpu .` or `--target gpu` (x86-64).
#
# The data lies in the volume /data. It listens on every address of the container, so MODELYARD_ADMIN_KEY must be given:
#   docker run -p 127.0.0.1:8080:8080 -v modelyard:/data -e MODELYARD_ADMIN_KEY=... modelyard
#
# Another package index: --build-arg PIP_INDEX_URL=...; another one for torch's CPU build: --build-arg TORCH_INDEX=...

ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS source
WORKDIR /app
COPY pyproject.toml README.md CONTRIBUTING.md CHANGELOG.md LICENSE ./
COPY requirements requirements
COPY migrations migrations
# The manual, which the server shows.
COPY docs docs
COPY benchmarks/RESULTS.md benchmarks/RESULTS.md
COPY src src

FROM source AS build-cpu
ARG PIP_INDEX_URL
ARG TORCH_INDEX
# A package cache in another file system can't be linked from.
ENV UV_LINK_MODE=copy UV_CACHE_DIR=/cache/uv PIP_CACHE_DIR=/cache/pip
RUN --mount=type=cache,target=/cache ENGINE=cpu python requirements/install.py server engine train

FROM source AS build-gpu
ARG PIP_INDEX_URL
ENV UV_LINK_MODE=copy UV_CACHE_DIR=/cache/uv PIP_CACHE_DIR=/cache/pip
RUN --mount=type=cache,target=/cache ENGINE=gpu python requirements/install.py server engine train

FROM ${PYTHON_IMAGE} AS base
# tini reaps what an engine that was killed leaves behind; no version is pinned, so that security updates come in.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 modelyard \
    && useradd --uid 10001 --gid 10001 --create-home modelyard \
    && install --directory --owner=modelyard --group=modelyard --mode=0700 /data
ENV MODELYARD_HOST=0.0.0.0 \
    MODELYARD_PORT=8080 \
    MODELYARD_DATA_DIR=/data \
    PYTHONUNBUFFERED=1
WORKDIR /home/modelyard
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["/app/.venv/bin/python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"MODELYARD_PORT\"]}/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "/app/.venv/bin/modelyard"]
CMD ["serve"]

FROM base AS gpu
# Triton, in vLLM, compiles the launchers of its kernels on the machine that they run on: it can't do without gcc.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /app /app
USER 10001:10001

# The last stage is what `docker build .` makes.
FROM base AS cpu
# There is no compiler in this image, so models run uncompiled; with room for adapters they do so on a CPU anyway.
ENV MODELYARD_ENGINE_ENFORCE_EAGER=true
COPY --from=build-cpu /app /app
USER 10001:10001
