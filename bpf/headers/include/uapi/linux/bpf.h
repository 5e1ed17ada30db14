/* Empty: BCC force-includes its own copy of linux/bpf.h, a second one would clash. */
