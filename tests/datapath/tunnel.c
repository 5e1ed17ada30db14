/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Gives a test packet what a VXLAN device would: test runs have no tunnel. Then goes on with the program under
 * test; fib_t_tunnel_only is for measuring what that costs. */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
#include "lib/maps.h"

struct tunnel {
	__u32 id;        /* network identifier */
	__u32 policy;    /* 0: none is set */
	__u32 remote[4]; /* network order; IPv4 in the first */
	__u32 family;    /* 4, 6; 0: no tunnel */
};

FIB_MAP("prog", __u32, __u32, next, 1, 0);
FIB_MAP("array", __u32, struct tunnel, tunnel, 1, 0);

static __always_inline int set_tunnel(struct __sk_buff *skb)
{
	struct bpf_tunnel_key key = {};
	struct tunnel *wanted;
	__u32 zero = 0;

	wanted = tunnel.lookup(&zero);
	if (!wanted)
		return -1;
	if (!wanted->family)
		return 0;
	key.tunnel_id = wanted->id;
	key.tunnel_ttl = 64;
	/* What is "local" to who sends is "remote" to who receives. */
	if (wanted->family == 4)
		key.local_ipv4 = bpf_ntohl(wanted->remote[0]);
	else
		__builtin_memcpy(key.local_ipv6, wanted->remote, sizeof(key.local_ipv6));
	if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), wanted->family == 6 ? BPF_F_TUNINFO_IPV6 : 0))
		return -1;
	if (wanted->policy)
		return bpf_skb_set_tunnel_opt(skb, &wanted->policy, sizeof(wanted->policy));
	return 0;
}

int fib_t_tunnel(struct __sk_buff *skb)
{
	if (set_tunnel(skb))
		return TC_ACT_STOLEN;
	next.call(skb, 0);
	return TC_ACT_STOLEN;
}

int fib_t_tunnel_only(struct __sk_buff *skb)
{
	return set_tunnel(skb) ? TC_ACT_STOLEN : TC_ACT_OK;
}
