#include_next <linux/icmp.h>
