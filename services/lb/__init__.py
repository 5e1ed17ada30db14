"""The lb service: services under addresses of their own, served by sockets, tc and XDP."""
