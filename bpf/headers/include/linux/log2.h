/* roundup_pow_of_two() is all BCC's helpers take from here. */
#pragma once
#define roundup_pow_of_two(n) \
	((n) < 2 ? 1UL : 1UL << (64 - __builtin_clzll((unsigned long long)(n) - 1)))
