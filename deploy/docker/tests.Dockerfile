# syntax=docker/dockerfile:1
# The test runner of docker-compose.test.yml: llorch, pytest and an ssh client.
FROM python:3.12-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
 && apt-get install -y --no-install-recommends openssh-client \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /opt/llorch \
 && /opt/llorch/bin/pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY llorch llorch
COPY llorch_demo llorch_demo
COPY llorch_pool llorch_pool
COPY llorch_wire llorch_wire
COPY orchestratord orchestratord
COPY worker worker
RUN /opt/llorch/bin/pip install --no-cache-dir --constraint constraints.txt --editable '.[worker,embedded,dev]'
COPY deploy deploy
COPY tests tests
COPY docker-compose.test.yml ./
ENV PATH=/opt/llorch/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    CI=true
ENTRYPOINT ["python", "-m", "pytest", "-p", "no:cacheprovider"]
CMD ["-v", "tests/deploy/test_topology.py"]
