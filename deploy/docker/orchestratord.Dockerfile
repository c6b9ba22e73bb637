# syntax=docker/dockerfile:1
# docker build -f deploy/docker/orchestratord.Dockerfile -t llorch/orchestratord .
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY llorch llorch
COPY llorch_demo llorch_demo
COPY llorch_pool llorch_pool
COPY llorch_wire llorch_wire
COPY orchestratord orchestratord
COPY worker worker
RUN python -m venv /opt/llorch \
 && /opt/llorch/bin/pip install --no-cache-dir --constraint constraints.txt '.[embedded]'

FROM python:3.12-slim-bookworm
RUN useradd --system --uid 10001 --home-dir /var/lib/orchestratord --create-home llorch
COPY --from=build /opt/llorch /opt/llorch
ENV PATH=/opt/llorch/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    LLORCH_HOST=0.0.0.0 \
    LLORCH_PORT=8080 \
    LLORCH_LOG_FORMAT=json \
    LLORCH_DATA_DIR=/var/lib/orchestratord
USER 10001
WORKDIR /var/lib/orchestratord
# Only the embedded Redis writes here; with LLORCH_REDIS_URL it stays empty.
VOLUME /var/lib/orchestratord
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/ready', timeout=4)"]
# A stop hands running tasks over to other replicas: give it 30 s (`docker stop -t 30`).
STOPSIGNAL SIGTERM
ENTRYPOINT ["orchestratord"]
