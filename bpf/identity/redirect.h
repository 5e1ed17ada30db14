/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* BCC declares bpf_redirect_neigh without its last argument, the flags. */
#pragma once

#include <uapi/linux/bpf.h>

static int (*redirect_neigh)(__u32 ifindex, struct bpf_redir_neigh *hop, int size, __u64 flags) = (void *)
	BPF_FUNC_redirect_neigh;
