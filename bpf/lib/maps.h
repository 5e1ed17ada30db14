/* How every map of Fibril is declared.
 *
 * FIB_MAP(type, key, value, name, max, flags): type is BCC's word for it as a string ("hash", "array", "percpu_array",
 * "lru_hash", "lpm_trie", "prog", "hash_of_maps$<inner map's name>", ...). The C code names no pin path: the loader
 * replaces the map by the one pinned under the path its spec gives, after comparing type, key size, value size,
 * max_entries and flags, or else pins the new one there. So any number of instances load the same source.
 *
 * FIB_RINGBUF(name, bytes): bytes is a power of two and a multiple of the page size.
 */
#pragma once

#define FIB_MAP(type, key, value, name, max, flags) BPF_F_TABLE(type, key, value, name, max, flags)
#define FIB_RINGBUF(name, bytes) BPF_RINGBUF_OUTPUT(name, (bytes) / PAGE_SIZE)
