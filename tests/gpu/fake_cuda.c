/* A CUDA driver over host memory: an address on the device is an address on the host, and a copy is done at once, or noted
 * while a stream captures and done at every launch of the graph. It has the functions that deploy/ calls, no others.
 *
 * FAKE_CUDA_DEVICES: number of GPUs (default 1; 0 as where CUDA_VISIBLE_DEVICES is empty). FAKE_CUDA_VERSION: of the driver.
 * FAKE_CUDA_FAILS: name of a function that fails with CUDA_ERROR_OUT_OF_MEMORY.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
enum { MAJOR = 75, MINOR = 76, MOST = 64 };

typedef struct { void *to; const void *from; size_t bytes; } Copy;
typedef struct { int count; Copy copies[MOST]; } Graph;
typedef struct { Graph *capturing; } Stream;
typedef struct { struct timespec at; } Event;

static int started, retained, live; /* live: what was made and not destroyed */
static void *current;

static int number(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}

#define FAILS() do { const char *f = getenv("FAKE_CUDA_FAILS"); if (f && !strcmp(f, __func__)) return OUT_OF_MEMORY; } while (0)
#define NEEDS_CONTEXT() do { FAILS(); if (!current) return INVALID_CONTEXT; } while (0)

int fake_live(void) { return live + retained; }

int cuInit(unsigned flags) { (void)flags; FAILS(); started = number("FAKE_CUDA_DEVICES", 1) > 0; return started ? SUCCESS : NO_DEVICE; }
int cuDriverGetVersion(int *version) { *version = number("FAKE_CUDA_VERSION", 13000); return SUCCESS; }
int cuDeviceGetCount(int *count) { *count = number("FAKE_CUDA_DEVICES", 1); return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return started ? SUCCESS : INVALID_VALUE; }
int cuDeviceGetName(char *name, int length, int device) { (void)device; snprintf(name, length, "Made-up GPU"); return SUCCESS; }
int cuDeviceGetPCIBusId(char *address, int length, int device) { (void)device; FAILS(); snprintf(address, length, "0000:65:00.0"); return SUCCESS; }
int cuDeviceTotalMem(size_t *bytes, int device) { (void)device; *bytes = (size_t)24 << 30; return SUCCESS; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  (void)device;
  *value = which == MAJOR ? 8 : which == MINOR ? 9 : 0;
  return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; FAILS(); retained++; *context = &retained; return SUCCESS; }
int cuDevicePrimaryCtxRelease(int device) { (void)device; retained--; return SUCCESS; }
int cuCtxSetCurrent(void *context) { current = context; return SUCCESS; }

int cuMemAlloc(uintptr_t *address, size_t bytes) {
  NEEDS_CONTEXT();
  if (!bytes) return INVALID_VALUE;
  *address = (uintptr_t)malloc(bytes);
  live++;
  return SUCCESS;
}
int cuMemFree(uintptr_t address) { free((void *)address); live--; return SUCCESS; }

static int copied(Stream *stream, void *to, const void *from, size_t bytes) {
  NEEDS_CONTEXT();
  if (stream->capturing) stream->capturing->copies[stream->capturing->count++] = (Copy){to, from, bytes};
  else memcpy(to, from, bytes);
  return SUCCESS;
}
int cuMemcpyHtoDAsync(uintptr_t to, const void *from, size_t bytes, Stream *stream) { return copied(stream, (void *)to, from, bytes); }
int cuMemcpyDtoHAsync(void *to, uintptr_t from, size_t bytes, Stream *stream) { return copied(stream, to, (void *)from, bytes); }

int cuStreamCreate(Stream **stream, unsigned flags) { (void)flags; NEEDS_CONTEXT(); *stream = calloc(1, sizeof(Stream)); live++; return SUCCESS; }
int cuStreamSynchronize(Stream *stream) { FAILS(); return stream->capturing ? INVALID_VALUE : SUCCESS; }
int cuStreamDestroy(Stream *stream) { free(stream); live--; return SUCCESS; }

int cuEventCreate(Event **event, unsigned flags) { (void)flags; NEEDS_CONTEXT(); *event = calloc(1, sizeof(Event)); live++; return SUCCESS; }
int cuEventRecord(Event *event, Stream *stream) { (void)stream; clock_gettime(CLOCK_MONOTONIC, &event->at); return SUCCESS; }
int cuEventSynchronize(Event *event) { return event->at.tv_sec ? SUCCESS : INVALID_VALUE; }
int cuEventElapsedTime(float *ms, Event *begin, Event *end) {
  *ms = (end->at.tv_sec - begin->at.tv_sec) * 1e3f + (end->at.tv_nsec - begin->at.tv_nsec) * 1e-6f;
  return SUCCESS;
}
int cuEventDestroy(Event *event) { free(event); live--; return SUCCESS; }

int cuStreamBeginCapture(Stream *stream, int mode) { (void)mode; stream->capturing = calloc(1, sizeof(Graph)); return SUCCESS; }
int cuStreamEndCapture(Stream *stream, Graph **graph) { *graph = stream->capturing; stream->capturing = NULL; live++; return SUCCESS; }
int cuGraphInstantiateWithFlags(Graph **made, Graph *graph, unsigned long long flags) {
  (void)flags;
  FAILS();
  *made = malloc(sizeof(Graph));
  **made = *graph;
  live++;
  return SUCCESS;
}
int cuGraphDestroy(Graph *graph) { free(graph); live--; return SUCCESS; }
int cuGraphExecDestroy(Graph *graph) { free(graph); live--; return SUCCESS; }
int cuGraphLaunch(Graph *graph, Stream *stream) {
  (void)stream;
  for (int i = 0; i < graph->count; i++) memcpy(graph->copies[i].to, graph->copies[i].from, graph->copies[i].bytes);
  return SUCCESS;
}

/* How the bindings find all of the above. */
int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status) {
  (void)version, (void)flags;
  Dl_info here;
  dladdr((void *)cuGetProcAddress_v2, &here);
  void *library = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  *found = strcmp(name, "cuGetProcAddress") ? dlsym(library, name) : (void *)cuGetProcAddress_v2;
  if (status) *status = *found ? 0 : 1;
  return *found ? SUCCESS : NOT_FOUND;
}
