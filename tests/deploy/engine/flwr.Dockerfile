# Stand-in for Flower's images where no registry of images is reached: the user, folders and environment that Flower's own
# base image has. It differs in Debian for Ubuntu or Alpine, and in the Python that Debian has.
FROM standin/debian
ARG FLWR_VERSION
# How pip reaches its index on this machine; deploy/Dockerfile's pip reads the same.
ARG PIP_INDEX_URL
ENV PIP_INDEX_URL=$PIP_INDEX_URL PIP_CERT=/etc/ssl/certs/ca-certificates.crt
RUN useradd --no-create-home --home-dir /app -c "" --uid 49999 app && mkdir -p /app && chown app:app /app \
    && install -d -o app -g app /python
USER app
RUN python3 -m venv /python/venv && /python/venv/bin/pip install --no-cache-dir flwr==$FLWR_VERSION
ENV PATH=/python/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONIOENCODING=UTF-8 LANG=C.UTF-8 LC_ALL=C.UTF-8 HOME=/app
WORKDIR /app
