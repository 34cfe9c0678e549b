/* What a C program does with the library: opens, writes, reads, trips over every kind of error.
 * Usage: smoke ADDRESSES IMAGE. Prints "ok" and returns 0, or says what was wrong. */

#include "drystone.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            fprintf(stderr, "line %d: %s; last error: %s\n", __LINE__, #condition,              \
                    drystone_last_error(client));                                               \
            return 1;                                                                           \
        }                                                                                       \
    } while (0)

static drystone_client *client;

static int wait_for(uint64_t user)
{
    drystone_completion done;
    int count = drystone_poll(client, &done, 1, -1);
    if (count != 1 || done.user != user) {
        fprintf(stderr, "poll: %d, user %llu\n", count, (unsigned long long)done.user);
        exit(1);
    }
    return done.result;
}

static int errors_without_a_client(void)
{
    drystone_client *none = NULL;
    uint64_t image;
    drystone_completion done;
    drystone_options odd = {0};
    odd.flags = 1u << 31;
    CHECK(drystone_connect(NULL, NULL, &none) == -EINVAL && none == NULL);
    CHECK(drystone_connect("nowhere", NULL, &none) == -EINVAL);
    CHECK(drystone_connect("127.0.0.1:1", NULL, NULL) == -EINVAL);
    CHECK(drystone_connect("127.0.0.1:1", &odd, &none) == -EINVAL);
    CHECK(drystone_open(NULL, "x", 0, &image) == -EINVAL);
    CHECK(drystone_poll(NULL, &done, 1, 0) == -EINVAL);
    CHECK(strcmp(drystone_last_error(NULL), "no client") == 0);
    drystone_free(NULL);
    drystone_free(&none);
    return 0;
}

static void *poll_elsewhere(void *of)
{
    drystone_completion done;
    return (void *)(intptr_t)drystone_poll(of, &done, 1, 0);
}

/* What a poll of this client in another thread returns. */
static int from_another_thread(drystone_client *of)
{
    pthread_t thread;
    void *result = NULL;
    if (pthread_create(&thread, NULL, poll_elsewhere, of) != 0 || pthread_join(thread, &result) != 0)
        exit(1);
    return (int)(intptr_t)result;
}

static int threads(const char *addresses)
{
    drystone_client *movable = NULL;
    drystone_options options = {0};
    options.flags = DRYSTONE_MOVABLE;
    CHECK(from_another_thread(client) == -EPERM);
    CHECK(strstr(drystone_last_error(client), "another thread") != NULL);
    CHECK(drystone_connect(addresses, &options, &movable) == 0);
    CHECK(from_another_thread(movable) == 0);
    drystone_free(&movable);
    return 0;
}

int main(int argc, char **argv)
{
    uint64_t image = 0, other = 0, size = 0;
    drystone_completion done[4];
    drystone_options options = {0};
    char *out = malloc(3 * 131072), *in = malloc(3 * 131072);

    if (argc != 3 || out == NULL || in == NULL)
        return 2;
    CHECK(drystone_abi_version() == DRYSTONE_ABI_VERSION);
    CHECK(strlen(drystone_version()) > 0);
    if (errors_without_a_client() != 0)
        return 1;

    options.open_timeout_ms = 5000;
    CHECK(drystone_connect(argv[1], &options, &client) == 0);
    if (threads(argv[1]) != 0)
        return 1;
    CHECK(drystone_open(client, "no such image", DRYSTONE_READ_WRITE, &image) == -ENOENT);
    CHECK(strstr(drystone_last_error(client), "no such image") != NULL);
    CHECK(drystone_open(client, NULL, DRYSTONE_READ_WRITE, &image) == -EINVAL);
    CHECK(drystone_open(client, argv[2], 99, &image) == -EINVAL);
    CHECK(drystone_open(client, argv[2], DRYSTONE_READ_WRITE, NULL) == -EINVAL);
    CHECK(drystone_open(client, argv[2], DRYSTONE_READ_WRITE, &image) == 0 && image != 0);
    CHECK(drystone_size(client, image, &size) == 0 && size >= 8 << 20);

    for (int i = 0; i < 3 * 131072; i++)
        out[i] = (char)(i * 31 + i / 4096);
    CHECK(drystone_write(client, image, 4096, out, 3 * 131072, 7) == 0);
    CHECK(wait_for(7) == 0);
    CHECK(drystone_flush(client, image, 8) == 0);
    CHECK(wait_for(8) == 0);
    CHECK(drystone_read(client, image, 4096, in, 3 * 131072, 9) == 0);
    CHECK(wait_for(9) == 0);
    CHECK(memcmp(in, out, 3 * 131072) == 0);
    CHECK(drystone_discard(client, image, 4096, 4096, 10) == 0);
    CHECK(wait_for(10) == 0);
    CHECK(drystone_write_zeroes(client, image, 8192, 4096, 11) == 0);
    CHECK(wait_for(11) == 0);
    CHECK(drystone_read(client, image, 4096, in, 12288, 12) == 0);
    CHECK(wait_for(12) == 0);
    for (int i = 0; i < 8192; i++)
        CHECK(in[i] == 0);
    CHECK(memcmp(in + 8192, out + 8192, 4096) == 0);

    CHECK(drystone_read(client, image, 1, in, 4096, 0) == -EINVAL);
    CHECK(drystone_read(client, image, size, in, 4096, 0) == -ERANGE);
    CHECK(drystone_read(client, image, 0, NULL, 4096, 0) == -EINVAL);
    CHECK(drystone_discard(client, image, 0, (uint64_t)64 << 20, 0) == -E2BIG);
    CHECK(drystone_read(client, 12345, 0, in, 4096, 0) == -EBADF);
    CHECK(drystone_poll(client, NULL, 1, 0) == -EINVAL);
    CHECK(drystone_poll(client, done, 4, 0) == 0);
    CHECK(drystone_poll(client, done, 4, 20000) == 0);

    /* The same with a descriptor to wait on. */
    CHECK(drystone_open_async(client, argv[2], DRYSTONE_READ_ONLY, 77) == 0);
    struct pollfd fd = {.fd = drystone_event_fd(client), .events = POLLIN};
    CHECK(fd.fd >= 0);
    int count;
    while ((count = drystone_poll(client, done, 4, 0)) == 0) {
        int due = drystone_next_due_ms(client);
        CHECK(poll(&fd, 1, due < 0 ? 1000 : due) >= 0);
    }
    CHECK(count == 1 && done[0].kind == DRYSTONE_OPENED && done[0].user == 77 && done[0].result == 0);
    other = done[0].image;
    CHECK(drystone_write(client, other, 0, out, 4096, 0) == -EACCES);
    CHECK(drystone_close(client, other) == 0);
    CHECK(drystone_close(client, other) == -EBADF);
    CHECK(drystone_close(client, image) == 0);
    CHECK(drystone_size(client, image, &size) == -EBADF);

    CHECK(strcmp(drystone_strerror(-ENOSPC), "no space left in the pool") == 0);
    CHECK(strcmp(drystone_strerror(0), "ok") == 0);
    drystone_free(&client);
    CHECK(client == NULL);
    drystone_free(&client);
    free(out);
    free(in);
    puts("ok");
    return 0;
}
