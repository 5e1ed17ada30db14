/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* An application that answers HTTP/1.1 requests without bodies on kept connections: sidecar PORT */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define FDS 4096

#define BODY "{\"name\":\"application\",\"content\":\"of sixty-four bytes\",\"ok\":true}"
_Static_assert(sizeof(BODY) - 1 == 64, "content-length");

static const char answer[] = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 64\r\n\r\n" BODY;
/* How much of the end of a request's header has come: a request may come in parts. */
static int seen[FDS];

static void serve(int poll, int fd)
{
	static const char end[] = "\r\n\r\n";
	char buffer[65536];
	ssize_t got = recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT);

	if (got < 0)
		return;
	if (!got) {
		epoll_ctl(poll, EPOLL_CTL_DEL, fd, 0);
		close(fd);
		return;
	}
	for (ssize_t at = 0; at < got; at++) {
		seen[fd] = buffer[at] == end[seen[fd]] ? seen[fd] + 1 : buffer[at] == '\r';
		if (seen[fd] == 4) {
			seen[fd] = 0;
			if (send(fd, answer, sizeof(answer) - 1, MSG_NOSIGNAL) < 0)
				return;
		}
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(atoi(argv[1])) };
	int listener = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0), one = 1;
	struct epoll_event event = { .events = EPOLLIN, .data.fd = listener }, ready[64];

	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (argc != 2 || bind(listener, (void *)&at, sizeof(at)) || listen(listener, 1024)) {
		perror("listen");
		return 1;
	}
	epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
	for (;;) {
		int count = epoll_wait(poll, ready, 64, -1);

		for (int number = 0; number < count; number++) {
			if (ready[number].data.fd != listener) {
				serve(poll, ready[number].data.fd);
				continue;
			}
			event.data.fd = accept(listener, 0, 0);
			if (event.data.fd < 0)
				continue;
			if (event.data.fd >= FDS) {
				close(event.data.fd);
				continue;
			}
			seen[event.data.fd] = 0;
			setsockopt(event.data.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
			epoll_ctl(poll, EPOLL_CTL_ADD, event.data.fd, &event);
		}
	}
}
