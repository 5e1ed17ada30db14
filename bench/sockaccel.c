/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Two processes and one connection, or one after the other:
 *
 *   sockaccel MODE SIZE MILLISECONDS CLIENT_CPU SERVER_CPU CLIENT_NETNS SERVER_NETNS ADDRESS PORT GROUP
 *
 * MODE     pp       SIZE bytes there and back: rounds a second
 *          stream   writes of SIZE bytes: writes a second
 *          warm     the same, after 200 rounds of 64 bytes
 *          connect  connections with a byte there and back: a second
 * ADDRESS  "unix": a pair of unix sockets
 * GROUP    directory of a control group for both, "-": where they are
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WARM 200

static char buffer[1 << 20];

static void must(int good, const char *what)
{
	if (!good) {
		perror(what);
		exit(1);
	}
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void place(const char *cpu, const char *space)
{
	cpu_set_t set;
	int fd;

	CPU_ZERO(&set);
	CPU_SET(atoi(cpu), &set);
	must(!sched_setaffinity(0, sizeof(set), &set), "affinity");
	fd = open(space, O_RDONLY);
	must(fd >= 0 && !setns(fd, CLONE_NEWNET), space);
	close(fd);
}

static int take(int fd, int size)
{
	int got = 0, more;

	while (got < size) {
		more = recv(fd, buffer, size - got, 0);
		if (more <= 0)
			return 0;
		got += more;
	}
	return 1;
}

static int give(int fd, int size)
{
	int sent = 0, more;

	while (sent < size) {
		more = send(fd, buffer, size - sent, MSG_NOSIGNAL);
		if (more <= 0)
			return 0;
		sent += more;
	}
	return 1;
}

static void quickly(int fd)
{
	int one = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
}

static void serve(const char *mode, int size, int listener, int fd)
{
	do {
		if (listener >= 0) {
			fd = accept(listener, 0, 0);
			must(fd >= 0, "accept");
			quickly(fd);
		}
		if (!strcmp(mode, "warm"))
			for (int round = 0; round < WARM && take(fd, 64) && give(fd, 64); round++)
				;
		if (!strcmp(mode, "pp") || !strcmp(mode, "connect"))
			while (take(fd, size) && give(fd, size))
				;
		else
			while (recv(fd, buffer, sizeof(buffer), 0) > 0)
				;
		close(fd);
	} while (!strcmp(mode, "connect"));
	_exit(0);
}

int main(int argc, char **argv)
{
	const char *mode = argv[1], *address = argv[8];
	int size = atoi(argv[2]), listener = -1, fd = -1, pair[2], one = 1;
	double seconds = atof(argv[3]) / 1000, began, spent;
	struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[9]))};
	long count = 0;
	pid_t server;

	if (strcmp(argv[10], "-")) {
		FILE *procs;
		char path[512];

		snprintf(path, sizeof(path), "%s/cgroup.procs", argv[10]);
		procs = fopen(path, "w");
		must(procs && fprintf(procs, "%d", getpid()) > 0 && !fclose(procs), path);
	}
	if (!strcmp(address, "unix")) {
		must(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair), "socketpair");
		fd = pair[0];
	} else {
		must(inet_pton(AF_INET, address, &to.sin_addr) == 1, address);
		place(argv[5], argv[7]);
		listener = socket(AF_INET, SOCK_STREAM, 0);
		setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		must(!bind(listener, (void *)&to, sizeof(to)), "bind");
		must(!listen(listener, 1024), "listen");
	}
	server = fork();
	if (!server) {
		place(argv[5], argv[7]);
		if (fd >= 0)
			close(fd);
		serve(mode, size, listener, fd >= 0 ? pair[1] : -1);
	}
	place(argv[4], argv[6]);
	if (fd >= 0)
		close(pair[1]);
	for (began = now();;) {
		if (listener >= 0 && (fd < 0 || !strcmp(mode, "connect"))) {
			fd = socket(AF_INET, SOCK_STREAM, 0);
			must(!connect(fd, (void *)&to, sizeof(to)), "connect");
			quickly(fd);
		}
		if (!count && !strcmp(mode, "warm")) {
			for (int round = 0; round < WARM; round++)
				must(give(fd, 64) && take(fd, 64), "warm");
			began = now();
		}
		must(give(fd, size), "send");
		if (!strcmp(mode, "pp") || !strcmp(mode, "connect"))
			must(take(fd, size), "recv");
		if (!strcmp(mode, "connect"))
			close(fd);
		count++;
		if (!(count & 31)) {
			spent = now() - began;
			if (spent > seconds)
				break;
		}
	}
	kill(server, SIGKILL);
	waitpid(server, 0, 0);
	printf("%.1f\n", count / spent);
	return 0;
}
