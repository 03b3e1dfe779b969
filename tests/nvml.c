/* An imitation of NVIDIA's NVML: the functions that hardware.py calls through nvidia-ml-py.

   Two GPUs of 80 GiB with 70 and 69 GiB free; or those of the folder NVML_GPUS: a GPU for each file `gpu-N`, which says
   its bytes, less what the files `taken-PID` say that living processes hold of it (lines "N bytes").
   NVML_FAILS=init|count|memory makes that function fail, as a driver that does not match its library does. */

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>

enum { SUCCESS = 0, ERROR_LIB_RM_VERSION_MISMATCH = 18, MOST = 16 };
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
static char devices[MOST];

static int fails(const char *what) {
    const char *failing = getenv("NVML_FAILS");
    return failing != NULL && strcmp(failing, what) == 0 ? ERROR_LIB_RM_VERSION_MISMATCH : SUCCESS;
}

static FILE *opened(const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", getenv("NVML_GPUS"), name);
    return fopen(path, "r");
}

static unsigned long long total_of(int index) {
    char name[32];
    unsigned long long total = 0;
    snprintf(name, sizeof name, "gpu-%d", index);
    FILE *file = opened(name);
    if (file != NULL) {
        if (fscanf(file, "%llu", &total) != 1) total = 0;
        fclose(file);
    }
    return total;
}

static unsigned long long taken_of(int index) {
    unsigned long long taken = 0, bytes;
    DIR *folder = opendir(getenv("NVML_GPUS"));
    for (struct dirent *entry; folder != NULL && (entry = readdir(folder)) != NULL;) {
        int pid, gpu;
        if (sscanf(entry->d_name, "taken-%d", &pid) != 1 || kill((pid_t)pid, 0) != 0) continue;
        FILE *file = opened(entry->d_name);
        while (file != NULL && fscanf(file, "%d %llu", &gpu, &bytes) == 2)
            if (gpu == index) taken += bytes;
        if (file != NULL) fclose(file);
    }
    if (folder != NULL) closedir(folder);
    return taken;
}

int nvmlInitWithFlags(unsigned int flags) { (void)flags; return fails("init"); }
int nvmlInit_v2(void) { return fails("init"); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int result) { (void)result; return "RM has detected an NVML/RM version mismatch."; }

int nvmlDeviceGetCount_v2(unsigned int *count) {
    *count = 2;
    if (getenv("NVML_GPUS") != NULL)
        for (*count = 0; *count < MOST && total_of((int)*count) > 0; ++*count) {}
    return fails("count");
}

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
    int index = index_of(device);
    if (getenv("NVML_GPUS") != NULL) {
        unsigned long long taken = taken_of(index);
        memory->total = total_of(index);
        memory->free = taken < memory->total ? memory->total - taken : 0;
    } else {
        memory->total = 80ULL << 30;
        memory->free = (unsigned long long)(70 - index) << 30;
    }
    memory->used = memory->total - memory->free;
    return fails("memory");
}
