/* Two threads wait in recv() at one socket for each word, and answer it; one of them leaves after some. Whoever is left must get all the
 * others. Prints how many connections came to a stop. */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static int client, server;
static atomic_int turns, leave;

static void *reader(void *unused)
{
	char word;

	for (;;) {
		ssize_t size = recv(server, &word, 1, 0);
		int turn;

		/* Woken, and too late: maps of sockets give this once. */
		if (size < 0 && errno == EAGAIN)
			continue;
		if (size != 1)
			return unused;
		turn = ++turns;
		if (write(server, &word, 1) != 1 || turn == leave)
			return unused;
	}
}

static void connect_both(void)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int listener = socket(AF_INET, SOCK_STREAM, 0), on = 1;
	socklen_t size = sizeof(at);

	if (bind(listener, (void *)&at, size) || listen(listener, 1) || getsockname(listener, (void *)&at, &size))
		exit(1);
	client = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(client, (void *)&at, size))
		exit(1);
	server = accept(listener, 0, 0);
	close(listener);
	setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
}

int main(int count, char **words)
{
	int stopped = 0;

	for (int number = 0; number < atoi(words[1]); number++) {
		pthread_t readers[2];

		connect_both();
		turns = 0;
		leave = 1 + number % 8;
		for (int at = 0; at < 2; at++)
			pthread_create(&readers[at], 0, reader, 0);
		for (int turn = 0; turn < 30; turn++) {
			struct pollfd ready = { .fd = client, .events = POLLIN };
			char word = 'x';

			if (write(client, &word, 1) != 1 || poll(&ready, 1, 3000) != 1 || read(client, &word, 1) != 1) {
				stopped++;
				break;
			}
		}
		shutdown(client, SHUT_WR);
		for (int at = 0; at < 2; at++)
			pthread_join(readers[at], 0);
		close(client);
		close(server);
	}
	printf("%d\n", stopped);
	return count != 2;
}
