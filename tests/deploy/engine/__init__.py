"""deploy/compose.yaml on a real Docker engine (start.sh), for test_containers.py."""
