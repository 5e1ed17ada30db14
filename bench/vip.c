// SPDX-License-Identifier: Apache-2.0
/*
 * How long it takes until a connection says its first byte, for bench/lb.py.
 *
 *   vip server NETNS CPU ADDRESS PORT     answers every connection with one byte
 *   vip client NETNS CPU                  for each line "ADDRESS PORT COUNT" on standard input: COUNT connections one after
 *                                         the other; prints the median in nanoseconds
 *
 * Connections end with a reset, so that neither side keeps anything of them. A failed call ends the run with its reason.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST 100000

static uint64_t taken[MOST];

static void fail(const char *what)
{
	fprintf(stderr, "vip: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void enter(const char *netns, int cpu)
{
	cpu_set_t set;
	int fd = open(netns, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || setns(fd, CLONE_NEWNET))
		fail(netns);
	close(fd);
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		fail("sched_setaffinity");
}

static void address(struct sockaddr_in *to, const char *text, int port)
{
	memset(to, 0, sizeof(*to));
	to->sin_family = AF_INET;
	to->sin_port = htons(port);
	if (inet_pton(AF_INET, text, &to->sin_addr) != 1)
		fail(text);
}

static void reset(int fd)
{
	struct linger now = { .l_onoff = 1 };

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
	close(fd);
}

static int serve(const char *text, int port)
{
	int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
	struct sockaddr_in at;

	address(&at, text, port);
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (listener < 0 || bind(listener, (void *)&at, sizeof(at)) || listen(listener, 1024))
		fail("listen");
	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept(listener, 0, 0);
		char gone;

		if (fd < 0)
			continue;
		if (write(fd, "x", 1) == 1 && read(fd, &gone, 1) < 0)
			errno = 0;
		close(fd);
	}
}

static uint64_t now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1000000000ull + at.tv_nsec;
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static void measure(const char *text, int port, int count)
{
	struct sockaddr_in to;

	address(&to, text, port);
	for (int at = 0; at < count; at++) {
		int fd = socket(AF_INET, SOCK_STREAM, 0);
		uint64_t begin = now();
		char byte;

		if (fd < 0 || connect(fd, (void *)&to, sizeof(to)) || read(fd, &byte, 1) != 1)
			fail(text);
		taken[at] = now() - begin;
		reset(fd);
	}
	qsort(taken, count, sizeof(*taken), compare);
	printf("%llu\n", (unsigned long long)taken[count / 2]);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	char text[64];
	int port, count;

	if (argc < 4)
		return 2;
	enter(argv[2], atoi(argv[3]));
	if (argc == 6)
		return serve(argv[4], atoi(argv[5]));
	while (scanf("%63s %d %d", text, &port, &count) == 3)
		measure(text, port, count < MOST ? count : MOST);
	return 0;
}
