/* Drystone's client library. Every function returns 0 or a count, or a negative errno.
 *
 * A client belongs to the thread that connected it (or, with DRYSTONE_MOVABLE, to one thread at a time).
 * Start operations, call drystone_poll until their completions have come; nothing happens in between.
 * Overlapping operations of one client are performed in the order they were started in, others in any
 * order. A completed write is durable. */
/* Generated from client/native/src/capi.rs by `make header`. Do not edit. */


#ifndef DRYSTONE_H
#define DRYSTONE_H

#include <stddef.h>
#include <stdint.h>

// Version of this interface: rises when a program has to be compiled anew.
#define DRYSTONE_ABI_VERSION 1

// `drystone_open`: reads, writes, discards, write-zeroes and flushes.
#define DRYSTONE_READ_WRITE 0

// `drystone_open`: reads and flushes only.
#define DRYSTONE_READ_ONLY 1

// `drystone_options.flags`: the client may be called from different threads, one at a time.
#define DRYSTONE_MOVABLE 1

// `drystone_options.flags`: a write that finds no space waits until there is some.
#define DRYSTONE_WAIT_FOR_SPACE 2

// `drystone_completion.kind`: a read, write, discard, write-zeroes or flush.
#define DRYSTONE_IO 0

// `drystone_completion.kind`: a `drystone_open_async`.
#define DRYSTONE_OPENED 1

// A client: any number of images of one cluster, served by the thread that calls. Use several in several
// threads.
typedef struct drystone_client drystone_client;

// How a client behaves. All zero means the defaults.
typedef struct drystone_options {
  // `DRYSTONE_MOVABLE`, `DRYSTONE_WAIT_FOR_SPACE`.
  uint32_t flags;
  // Reserved, zero.
  uint32_t reserved;
  // Milliseconds after which an operation ends with `-ETIMEDOUT`; 0 = it is tried forever.
  uint64_t io_timeout_ms;
  // Milliseconds that opening an image may take; 0 = 10,000.
  uint64_t open_timeout_ms;
} drystone_options;

// A finished operation.
typedef struct drystone_completion {
  // From the call that started it.
  uint64_t user;
  // The image opened (`DRYSTONE_OPENED`), else 0.
  uint64_t image;
  // 0, or a negative errno.
  int32_t result;
  // `DRYSTONE_IO` or `DRYSTONE_OPENED`.
  uint32_t kind;
} drystone_completion;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Makes a client. `addresses` is `HOST:PORT[,HOST:PORT...]`, control addresses of any nodes; `options`
// may be NULL. On success `*client` is set. Connecting itself happens later: an unreachable cluster shows
// in `drystone_open`.
//
// # Safety
// `addresses` is NUL-terminated; `options` and `client` point to what they say or are NULL.
int drystone_connect(const char *addresses,
                     const struct drystone_options *options,
                     struct drystone_client **client);

// Ends a client and sets `*client` to NULL, so that a second call does nothing. Operations under way are
// given up: writes may have happened or not. Afterwards no buffer is touched any more.
//
// # Safety
// `client` is NULL or points to NULL or to what `drystone_connect` gave.
void drystone_free(struct drystone_client **client);

// Opens an image by name and waits for it; operations under way go on meanwhile. On success `*image` is
// set. `mode` is `DRYSTONE_READ_WRITE` or `DRYSTONE_READ_ONLY`. Typical errors: `-ENOENT`,
// `-EHOSTUNREACH`, `-ETIMEDOUT`; `drystone_last_error` says more.
//
// # Safety
// `client` came from `drystone_connect`; `name` is NUL-terminated; `image` may be written.
int drystone_open(struct drystone_client *client,
                  const char *name,
                  uint32_t mode,
                  uint64_t *image);

// Starts opening an image; a completion of kind `DRYSTONE_OPENED` with `user` follows.
//
// # Safety
// `client` came from `drystone_connect`; `name` is NUL-terminated.
int drystone_open_async(struct drystone_client *client,
                        const char *name,
                        uint32_t mode,
                        uint64_t user);

// Takes no more operations for an image; those under way complete. A second close gives `-EBADF`.
//
// # Safety
// `client` came from `drystone_connect`.
int drystone_close(struct drystone_client *client, uint64_t image);

// The image's size in bytes, which follows a resize.
//
// # Safety
// `client` came from `drystone_connect`; `size_bytes` may be written.
int drystone_size(struct drystone_client *client, uint64_t image, uint64_t *size_bytes);

// Starts a read of `len` bytes at `offset`, both multiples of 4096, into `buffer`, which must not be
// touched until the completion. `-EAGAIN`: too much is under way, poll first.
//
// # Safety
// `client` came from `drystone_connect`; `buffer` is writable for `len` bytes until the completion was
// polled or the client was freed.
int drystone_read(struct drystone_client *client,
                  uint64_t image,
                  uint64_t offset,
                  void *buffer,
                  size_t len,
                  uint64_t user);

// Starts a write of `len` bytes at `offset`, both multiples of 4096, from `buffer`, which must not change
// until the completion. Once completed the data is durable. `-EAGAIN`: too much is under way, poll first.
//
// # Safety
// `client` came from `drystone_connect`; `buffer` is readable for `len` bytes until the completion was
// polled or the client was freed.
int drystone_write(struct drystone_client *client,
                   uint64_t image,
                   uint64_t offset,
                   const void *buffer,
                   size_t len,
                   uint64_t user);

// Says that a range need not be kept: it reads as zeroes from then on, and its space is freed.
//
// # Safety
// `client` came from `drystone_connect`.
int drystone_discard(struct drystone_client *client,
                     uint64_t image,
                     uint64_t offset,
                     uint64_t len,
                     uint64_t user);

// Makes a range read as zeroes.
//
// # Safety
// `client` came from `drystone_connect`.
int drystone_write_zeroes(struct drystone_client *client,
                          uint64_t image,
                          uint64_t offset,
                          uint64_t len,
                          uint64_t user);

// Completes once every write, discard and write-zeroes of this image submitted before has completed.
//
// # Safety
// `client` came from `drystone_connect`.
int drystone_flush(struct drystone_client *client,
                   uint64_t image,
                   uint64_t user);

// Sends, receives, and writes up to `max` completions to `completions`; returns how many. With none at
// hand it waits up to `timeout_us` microseconds for one (0: not at all, negative: as long as it takes).
// Before waiting on `drystone_event_fd` instead, call it until it returns 0.
//
// # Safety
// `client` came from `drystone_connect`; `completions` is writable for `max` entries.
int drystone_poll(struct drystone_client *client,
                  struct drystone_completion *completions,
                  uint32_t max,
                  int64_t timeout_us);

// A descriptor that becomes readable when `drystone_poll` has something to do. It belongs to the client:
// do not read or close it.
//
// # Safety
// `client` came from `drystone_connect`.
int drystone_event_fd(struct drystone_client *client);

// Milliseconds after which `drystone_poll` has to be called even if the descriptor stays silent, rounded
// up; `-1` when there is no such time. Fits `poll(2)` and `epoll_wait(2)`.
//
// # Safety
// `client` came from `drystone_connect`.
int drystone_next_due_ms(struct drystone_client *client);

// What went wrong last with this client, for a person; empty when nothing did. Valid until the next call
// with this client.
//
// # Safety
// `client` is NULL or came from `drystone_connect`.
const char *drystone_last_error(const struct drystone_client *client);

// A return value or a completion's result in words. Static.
const char *drystone_strerror(int result);

// The library's version, such as `0.1.0`. Static.
const char *drystone_version(void);

// `DRYSTONE_ABI_VERSION` of the library that is loaded.
uint32_t drystone_abi_version(void);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DRYSTONE_H */
