// SPDX-License-Identifier: Apache-2.0
/*
 * What connect(2) of a UDP socket costs, for bench/lbsock.py.
 *
 *   lbsock NETNS CPU COUNT
 *
 * For each line "ADDRESS PORT" on standard input but the first: make COUNT sockets, connect each there once, then the first one
 * COUNT times more, close all. Prints nanoseconds a call: of a first connect(), of a further one, of close(). A failed
 * call prints its reason and exits with 1.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *what)
{
	fprintf(stderr, "lbsock: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static socklen_t parse(const char *text, int port, struct sockaddr_storage *address)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)address;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)address;

	memset(address, 0, sizeof(*address));
	if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(port);
		return sizeof(*v4);
	}
	if (inet_pton(AF_INET6, text, &v6->sin6_addr) != 1) {
		errno = EINVAL;
		fail(text);
	}
	v6->sin6_family = AF_INET6;
	v6->sin6_port = htons(port);
	return sizeof(*v6);
}

static void measure(const char *text, int port, int count, int *sockets)
{
	struct sockaddr_storage address;
	socklen_t length = parse(text, port, &address);
	double start, middle, first = 0, further, closing = 0;
	int fd = -1;

	for (int i = 0; i < count; i++) {
		fd = socket(address.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
		if (fd < 0)
			fail("socket");
		start = now();
		if (connect(fd, (struct sockaddr *)&address, length))
			fail("connect");
		middle = now();
		first += middle - start;
		close(fd);
		closing += now() - middle;
	}
	fd = socket(address.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	start = now();
	for (int i = 0; i < count; i++)
		if (connect(fd, (struct sockaddr *)&address, length))
			fail("connect");
	further = now() - start;
	close(fd);
	printf("%f %f %f\n", first / count, further / count, closing / count);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	struct rlimit files = { 65536, 65536 };
	char line[128], text[64];
	cpu_set_t set;
	int fd, port, count, *sockets;

	/* The control group counts where a socket is made: whoever started this has moved it by the first line. */
	if (argc != 4 || !fgets(line, sizeof(line), stdin))
		return 2;
	fd = open(argv[1], O_RDONLY | O_CLOEXEC);
	if (fd < 0 || setns(fd, CLONE_NEWNET))
		fail(argv[1]);
	CPU_ZERO(&set);
	CPU_SET(atoi(argv[2]), &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		fail("sched_setaffinity");
	setrlimit(RLIMIT_NOFILE, &files);
	count = atoi(argv[3]);
	sockets = calloc(count, sizeof(*sockets));
	while (fgets(line, sizeof(line), stdin))
		if (sscanf(line, "%63s %d", text, &port) == 2)
			measure(text, port, count, sockets);
	return 0;
}
