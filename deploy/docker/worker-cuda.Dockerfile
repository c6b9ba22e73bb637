# syntax=docker/dockerfile:1
# docker build -f deploy/docker/worker-cuda.Dockerfile -t llorch/worker-cuda .
# docker run --gpus all … needs the NVIDIA container toolkit, and a driver from 580 on for CUDA 13.
# For older drivers (525 on): --build-arg CUDA=12.6.3 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126
ARG CUDA=13.0.1

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cu130
# "" leaves flash-attn out; the engine then takes torch's own attention.
ARG FLASH_ATTN=1
# GPU generations that flash-attn is built for: 80 A100, 90 H100, 100 B200. Fewer build faster.
ARG FLASH_ATTN_CUDA_ARCHS="80;90"
# One job of its compiler takes about 4 GiB.
ARG MAX_JOBS=4
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3.12 python3.12-dev python3.12-venv git \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
RUN python3.12 -m venv /opt/llorch \
 && /opt/llorch/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY llorch llorch
COPY llorch_demo llorch_demo
COPY llorch_pool llorch_pool
COPY llorch_wire llorch_wire
COPY orchestratord orchestratord
COPY worker worker
RUN /opt/llorch/bin/pip wheel --no-cache-dir --no-deps --wheel-dir dist . \
 && /opt/llorch/bin/pip install --no-cache-dir --constraint constraints.txt "$(echo dist/llorch-*.whl)[worker]"
# flash-attn builds against the torch that is installed: after it, and outside of pip's build isolation.
RUN if [ -n "$FLASH_ATTN" ]; then \
      /opt/llorch/bin/pip install --no-cache-dir ninja packaging psutil setuptools wheel \
   && FLASH_ATTN_CUDA_ARCHS="$FLASH_ATTN_CUDA_ARCHS" MAX_JOBS="$MAX_JOBS" \
      /opt/llorch/bin/pip install --no-cache-dir --no-build-isolation --constraint constraints.txt "$(echo dist/llorch-*.whl)[cuda]"; \
    fi

# torch brings CUDA's libraries itself: the image below it needs none but the driver's, which are mounted in.
FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3.12 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --home-dir /var/lib/llorch --create-home llorch
COPY --from=build /opt/llorch /opt/llorch
ENV PATH=/opt/llorch/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LLORCH_LOG_FORMAT=json \
    LLORCH_MODELS=/var/lib/llorch/models \
    LLORCH_WORKER_HOST=0.0.0.0 \
    LLORCH_WORKER_PORT=8100 \
    LLORCH_WORKER_MODEL=demo
USER 10001
WORKDIR /var/lib/llorch
VOLUME /var/lib/llorch
EXPOSE 8100
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
  CMD ["python", "-c", "import json, urllib.request as u; assert json.load(u.urlopen('http://127.0.0.1:8100/health', timeout=4))['status'] in ('ready', 'draining')"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["llorch-worker"]
