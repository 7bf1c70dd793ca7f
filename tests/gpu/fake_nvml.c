/* NVIDIA's management library for one made-up GPU. It has the functions that deploy/ calls, no others; built with -DOLD it lacks
 * that of the reasons for lower clocks, as old drivers do.
 *
 * FAKE_NVML_REASONS: bits of the reasons (default 0). FAKE_NVML_FAILS: name of a function that is not supported.
 * Every look at the clocks finds them 15 MHz lower, from 1980 MHz.
 */
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
enum { SM = 1, MEMORY = 2, SHUTDOWN_TWICE = 77 };
typedef struct { unsigned version; int sensor; int value; } Temperature;

static int started, looks;
#define NEEDS() do { const char *f = getenv("FAKE_NVML_FAILS"); if (!started) return UNINITIALIZED; \
  if (f && !strcmp(f, __func__)) return NOT_SUPPORTED; } while (0)

int fake_started(void) { return started; }
int nvmlInit_v2(void) { started++; return SUCCESS; }
int nvmlShutdown(void) { return started-- > 0 ? SUCCESS : SHUTDOWN_TWICE; }
const char *nvmlErrorString(int code) { return code == NOT_FOUND ? "Not Found" : "an error"; }

int nvmlDeviceGetHandleByPciBusId_v2(const char *address, void **device) {
  NEEDS();
  *device = &started;
  return strcmp(address, "0000:65:00.0") ? NOT_FOUND : SUCCESS;
}
int nvmlDeviceGetClockInfo(void *device, int type, unsigned *mhz) {
  (void)device;
  NEEDS();
  *mhz = type == SM ? 1980 - 15 * looks++ : 2619;
  return SUCCESS;
}
int nvmlDeviceGetMaxClockInfo(void *device, int type, unsigned *mhz) {
  (void)device;
  NEEDS();
  *mhz = type == SM ? 1980 : 0;
  return SUCCESS;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { (void)device; NEEDS(); *milliwatts = 412500; return SUCCESS; }
int nvmlDeviceGetEnforcedPowerLimit(void *device, unsigned *milliwatts) {
  (void)device;
  NEEDS();
  *milliwatts = 700000;
  return SUCCESS;
}
int nvmlDeviceGetTemperatureV(void *device, Temperature *found) { (void)device; NEEDS(); found->value = 61; return SUCCESS; }
#ifndef OLD
int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *reasons) {
  const char *bits = getenv("FAKE_NVML_REASONS");
  (void)device;
  NEEDS();
  *reasons = bits ? strtoull(bits, NULL, 0) : 0;
  return SUCCESS;
}
#endif
