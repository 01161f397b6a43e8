/*
 * pause keeps the namespaces of a runc pod alive: it sleeps, reaps orphans when
 * it is pid 1 of the pod, and ends on SIGINT or SIGTERM.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>

int main(int argc, char **argv)
{
	sigset_t signals;
	int signo;

	if (argc > 1 && !strcmp(argv[1], "-v")) {
		puts("pause (atoll)");
		return 0;
	}
	sigemptyset(&signals);
	sigaddset(&signals, SIGINT);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGCHLD);
	if (sigprocmask(SIG_BLOCK, &signals, NULL) < 0) {
		perror("blocking signals");
		return 1;
	}
	for (;;) {
		signo = sigwaitinfo(&signals, NULL);
		if (signo < 0 && errno != EINTR) {
			perror("waiting for a signal");
			return 1;
		}
		if (signo == SIGINT || signo == SIGTERM)
			return 0;
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
	}
}
