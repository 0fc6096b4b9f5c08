# Stand-in for nginx:1.29.3-alpine: Debian's nginx, with the wget that BusyBox has there and that image's stop signal.
FROM standin/debian
RUN ln -sf /dev/stdout /var/log/nginx/access.log && ln -sf /dev/stderr /var/log/nginx/error.log
EXPOSE 80
STOPSIGNAL SIGQUIT
CMD ["nginx", "-g", "daemon off;"]
