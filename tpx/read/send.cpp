// From files to a device through two page-locked buffers, with nothing of Python between the pieces.
#include <cerrno>
#include <cstdint>
#include <unistd.h>

namespace {

constexpr int HOST_TO_DEVICE = 1;  // cudaMemcpyKind

// CUDA's own functions, which are not linked; each gives an error's number, or 0.
struct Cuda {
  int (*set_device)(int);
  int (*copy)(void* to, const void* from, size_t nbytes, int kind, void* stream);
  int (*record)(void* event, void* stream);
  int (*wait)(void* event);
  void* stream;
  int device;
};

struct Part {
  int64_t file, offset, nbytes;
  char* to;
};

// Bytes read; fewer than asked at the file's end, or where a read fails.
int64_t read_at(const Part& part, int64_t done, char* buffer, int64_t nbytes) {
  int64_t got = 0;
  while (got < nbytes) {
    const ssize_t more =
        pread(static_cast<int>(part.file), buffer + got, nbytes - got, part.offset + done + got);
    if (more > 0) got += more;
    if (more == 0 || (more < 0 && errno != EINTR)) break;
  }
  return got;
}

}  // namespace

// Reads the parts in order, at most `piece` bytes at a time, into the two halves of `buffer` in turn
// (2 * piece bytes), and begins to copy each when it is read. events: of the halves. Gives the bytes
// read: fewer than the parts have where a read fails, or a call of CUDA, whose error is then not 0.
extern "C" int64_t tpx_send(const Cuda* cuda, const Part* parts, int64_t count, char* buffer,
                            void* const* events, int64_t piece, int* error) {
  int64_t sent = 0, turn = 0;
  if ((*error = cuda->set_device(cuda->device))) return sent;
  for (const Part* part = parts; part < parts + count; ++part) {
    for (int64_t done = 0; done < part->nbytes; ++turn) {
      const int64_t left = part->nbytes - done, size = left < piece ? left : piece;
      char* half = buffer + turn % 2 * piece;
      if (turn > 1 && (*error = cuda->wait(events[turn % 2]))) return sent;
      const int64_t got = read_at(*part, done, half, size);
      *error = cuda->copy(part->to + done, half, got, HOST_TO_DEVICE, cuda->stream);
      if (*error || (*error = cuda->record(events[turn % 2], cuda->stream))) return sent;
      done += got;
      sent += got;
      if (got < size) return sent;
    }
  }
  return sent;
}
