/* One map of each type Fibril uses, all touched by one program. */
#include <linux/pkt_cls.h>
#include "lib/maps.h"

struct prefix { u32 length; u32 address; };

FIB_MAP("array", u32, u64, m_array, 4, 0);
FIB_MAP("percpu_array", u32, u64, m_percpu, 4, 0);
FIB_MAP("hash", u32, u64, m_hash, 64, BPF_F_NO_PREALLOC);
FIB_MAP("lru_hash", u32, u64, m_lru, 64, 0);
FIB_MAP("percpu_hash", u32, u64, m_pchash, 64, 0);
FIB_MAP("lpm_trie", struct prefix, u64, m_lpm, 64, BPF_F_NO_PREALLOC);
FIB_MAP("hash", u32, u64, m_inner, 64, BPF_F_NO_PREALLOC);
FIB_MAP("hash_of_maps$m_inner", u32, u32, m_outer, 8, 0);

int touch(struct __sk_buff *skb)
{
	u32 key = 1;
	u64 *a = m_array.lookup(&key), *b = m_percpu.lookup(&key), *c = m_hash.lookup(&key);
	u64 *d = m_lru.lookup(&key), *e = m_pchash.lookup(&key), *g = 0;
	struct prefix p = { 32, 1 };
	u64 *f = m_lpm.lookup(&p);
	void *inner = m_outer.lookup(&key);

	if (inner)
		g = bpf_map_lookup_elem(inner, &key);
	return (a ? *a : 0) + (b ? *b : 0) + (c ? *c : 0) + (d ? *d : 0) + (e ? *e : 0) + (f ? *f : 0) + (g ? *g : 0);
}
