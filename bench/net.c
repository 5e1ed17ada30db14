// SPDX-License-Identifier: Apache-2.0
/*
 * Request/response, connection and stream rates between two network namespaces, for bench/pod.py.
 *
 *   net rr|crr|stream CLIENT_NETNS SERVER_NETNS ADDRESS MILLISECONDS CLIENT_CPU SERVER_CPU [WARMUP_MS]
 *
 * Two processes, client and server, each bound to its CPU; the server listens on ADDRESS (v4 or v6) before the client
 * begins. Prints one number: transactions a second (rr: 1 byte each way on one connection; crr: connect, 1 byte each
 * way, close) or, for stream, bits a second received. A failed system call prints its reason and exits with 1; there
 * are no retries, so a failed connection fails the run.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PORT 5201
#define CHUNK (128 * 1024)

static char buffer[CHUNK];

static void fail(const char *what)
{
	fprintf(stderr, "net: %s: %s\n", what, strerror(errno));
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
	/* Before everybody else on this CPU, so that a busy machine disturbs less. Without the right to, go on. */
	sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 1});
}

static socklen_t endpoint(const char *text, struct sockaddr_storage *address)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)address;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)address;

	memset(address, 0, sizeof(*address));
	if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(PORT);
		return sizeof(*v4);
	}
	if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons(PORT);
		return sizeof(*v6);
	}
	errno = EINVAL;
	fail(text);
	return 0;
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static int new_socket(int family)
{
	int one = 1, fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		fail("socket");
	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		fail("TCP_NODELAY");
	return fd;
}

/*
 * Until killed, one connection after another: echo bytes (rr), echo one byte and close (crr: the server closes first,
 * so that TIME_WAIT lies where it does not use up the client's ports), or swallow (stream).
 */
static void serve(int listener, int crr, int stream)
{
	for (;;) {
		int one = 1, fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		ssize_t got;

		if (fd < 0)
			fail("accept");
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		while ((got = read(fd, buffer, stream ? CHUNK : 1)) > 0)
			if (!stream && (write(fd, buffer, got) != got || crr))
				break;
		close(fd);
	}
}

static int connected(const struct sockaddr_storage *address, socklen_t length)
{
	int fd = new_socket(address->ss_family);

	if (connect(fd, (const struct sockaddr *)address, length))
		fail("connect");
	return fd;
}

static void transact(int fd)
{
	if (write(fd, buffer, 1) != 1)
		fail("write");
	if (read(fd, buffer, 1) != 1)
		fail("read");
}

static uint64_t run_rr(int fd, double until)
{
	uint64_t count = 0;

	while (now() < until) {
		transact(fd);
		count++;
	}
	return count;
}

static uint64_t run_crr(const struct sockaddr_storage *address, socklen_t length, double until)
{
	uint64_t count = 0;

	while (now() < until) {
		int fd = connected(address, length);

		transact(fd);
		if (read(fd, buffer, 1) != 0)
			fail("end of connection");
		close(fd);
		count++;
	}
	return count;
}

/* Bytes the peer's TCP has acknowledged within the time: what is in flight at its end does not count. */
static uint64_t run_stream(int fd, double until)
{
	struct tcp_info before, after;
	socklen_t length = sizeof(before);

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &before, &length))
		fail("TCP_INFO");
	while (now() < until)
		if (write(fd, buffer, CHUNK) < 0)
			fail("write");
	length = sizeof(after);
	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &after, &length))
		fail("TCP_INFO");
	return (after.tcpi_bytes_acked - before.tcpi_bytes_acked) * 8;
}

int main(int argc, char **argv)
{
	struct sockaddr_storage address;
	int crr, stream, ready[2], listener, fd, one = 1;
	uint64_t count;
	double start, seconds, warmup;
	socklen_t length;
	pid_t server;
	char byte;

	if (argc < 8) {
		fprintf(stderr, "usage: net rr|crr|stream CLIENT_NETNS SERVER_NETNS ADDRESS MS CLIENT_CPU SERVER_CPU "
				"[WARMUP_MS]\n");
		return 2;
	}
	crr = !strcmp(argv[1], "crr");
	stream = !strcmp(argv[1], "stream");
	length = endpoint(argv[4], &address);
	seconds = atoi(argv[5]) / 1e3;
	warmup = argc > 8 ? atoi(argv[8]) / 1e3 : 0.05;
	if (pipe(ready))
		fail("pipe");
	server = fork();
	if (server < 0)
		fail("fork");
	if (!server) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		enter(argv[3], atoi(argv[7]));
		listener = new_socket(address.ss_family);
		setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 1024))
			fail("listen");
		if (write(ready[1], "", 1) != 1)
			fail("pipe");
		serve(listener, crr, stream);
	}
	close(ready[1]);
	if (read(ready[0], &byte, 1) != 1)
		return 1;
	enter(argv[2], atoi(argv[6]));
	if (crr) {
		run_crr(&address, length, now() + warmup);
		start = now();
		count = run_crr(&address, length, start + seconds);
	} else {
		fd = connected(&address, length);
		stream ? run_stream(fd, now() + warmup) : run_rr(fd, now() + warmup);
		start = now();
		count = stream ? run_stream(fd, start + seconds) : run_rr(fd, start + seconds);
	}
	printf("%.1f\n", count / (now() - start));
	kill(server, SIGKILL);
	waitpid(server, NULL, 0);
	return 0;
}
