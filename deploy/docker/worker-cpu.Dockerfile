# syntax=docker/dockerfile:1
# docker build -f deploy/docker/worker-cpu.Dockerfile -t llorch/worker-cpu .
FROM python:3.12-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY constraints.txt ./
# Torch first, in a layer of its own: it is the largest and changes least.
RUN python -m venv /opt/llorch \
 && /opt/llorch/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY llorch llorch
COPY llorch_demo llorch_demo
COPY llorch_pool llorch_pool
COPY llorch_wire llorch_wire
COPY orchestratord orchestratord
COPY worker worker
RUN /opt/llorch/bin/pip install --no-cache-dir --constraint constraints.txt '.[worker]'

FROM python:3.12-slim-bookworm
RUN useradd --system --uid 10001 --home-dir /var/lib/llorch --create-home llorch
COPY --from=build /opt/llorch /opt/llorch
ENV PATH=/opt/llorch/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    LLORCH_LOG_FORMAT=json \
    LLORCH_MODELS=/var/lib/llorch/models \
    LLORCH_WORKER_HOST=0.0.0.0 \
    LLORCH_WORKER_PORT=8100 \
    LLORCH_WORKER_MODEL=demo \
    LLORCH_WORKER_DEVICE=cpu
USER 10001
WORKDIR /var/lib/llorch
VOLUME /var/lib/llorch
EXPOSE 8100
# Draining is healthy: a stop must not be hurried.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
  CMD ["python", "-c", "import json, urllib.request as u; assert json.load(u.urlopen('http://127.0.0.1:8100/health', timeout=4))['status'] in ('ready', 'draining')"]
# A stop lets running work finish: give it 60 s (`docker stop -t 60`).
STOPSIGNAL SIGTERM
ENTRYPOINT ["llorch-worker"]
