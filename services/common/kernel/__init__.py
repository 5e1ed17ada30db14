"""Adapters to the kernel: BPF objects, netlink, namespaces, cgroups, nftables, sysctls.

Each blocking library has one adapter module here and nothing else imports it. BCC is imported only by
`load`, which runs as a short-lived child process; pyroute2 only by `netlink`, on first use.
"""
