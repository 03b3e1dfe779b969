/* An imitation of NVIDIA's NVML with two GPUs: the functions that hardware.py calls through nvidia-ml-py.
   NVML_FAILS=init|count|memory makes that function fail, as a driver that does not match its library does. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, ERROR_LIB_RM_VERSION_MISMATCH = 18 };
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
static char devices[2];

static int fails(const char *what) {
    const char *failing = getenv("NVML_FAILS");
    return failing != NULL && strcmp(failing, what) == 0 ? ERROR_LIB_RM_VERSION_MISMATCH : SUCCESS;
}

int nvmlInitWithFlags(unsigned int flags) { (void)flags; return fails("init"); }
int nvmlInit_v2(void) { return fails("init"); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int result) { (void)result; return "RM has detected an NVML/RM version mismatch."; }

int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return fails("count"); }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) { *device = &devices[index]; return SUCCESS; }

static int index_of(void *device) { return (int)((char *)device - devices); }

int nvmlDeviceGetName(void *device, char *name, unsigned int length) {
    snprintf(name, length, "NVIDIA Imitation %d", index_of(device));
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned int length) {
    snprintf(uuid, length, "GPU-00000000-0000-0000-0000-00000000000%d", index_of(device));
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, nvmlMemory_t *memory) {
    memory->total = 80ULL << 30;
    memory->free = (unsigned long long)(70 - index_of(device)) << 30;
    memory->used = memory->total - memory->free;
    return fails("memory");
}
