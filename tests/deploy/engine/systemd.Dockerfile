# A machine with systemd and, in /opt/tofu-fl, what `make setup` makes of a checkout: for test_systemd.py.
FROM tofu-fl/app:0.1.0
USER 0
RUN apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends systemd systemd-sysv dbus
RUN cp -r /app /opt/tofu-fl && ln -s /python/venv /opt/tofu-fl/.venv && groupadd tofu-data \
    && echo /opt/tofu-fl > "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tofu.pth"
ENV PYTHONPATH= HOME=/root
WORKDIR /opt/tofu-fl
# As on a machine of its own, where systemd makes mounts shared: services get their credentials by one.
ENTRYPOINT ["sh", "-c", "mount --make-rshared / && exec /sbin/init"]
