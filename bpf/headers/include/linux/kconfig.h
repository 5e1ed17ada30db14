/* Stand-in for the kernel's generated configuration: what BCC's helpers test for. */
#pragma once
#define CONFIG_BPF_SYSCALL 1
