/* The version only steers conditionals in BCC's helpers; 6.1 is the oldest kernel Fibril supports. */
#pragma once
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#ifdef LINUX_VERSION_CODE_OVERRIDE
#define LINUX_VERSION_CODE LINUX_VERSION_CODE_OVERRIDE
#else
#define LINUX_VERSION_CODE KERNEL_VERSION(6, 1, 0)
#endif
