# syntax=docker/dockerfile:1
# A machine for tests: sshd and llorch-pool. Whoever has the key in /keys may log in as `pool`; nobody else, and no password.
FROM python:3.12-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
 && apt-get install -y --no-install-recommends openssh-server \
 && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
 && mkdir -p /run/sshd
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
RUN /opt/llorch/bin/pip install --no-cache-dir --constraint constraints.txt '.[worker]' \
 && ln -s /opt/llorch/bin/llorch-pool /usr/local/bin/ \
 && useradd --uid 10001 --create-home --shell /bin/bash pool \
 && usermod --password '*' pool
COPY deploy/docker/pool-host.sshd_config /etc/ssh/sshd_config
EXPOSE 22
# The host key is made anew for each container: none stands in the image.
ENTRYPOINT ["/bin/sh", "-c", "ssh-keygen -A && exec /usr/sbin/sshd -D -e"]
