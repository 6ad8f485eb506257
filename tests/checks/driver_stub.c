/* A libnvidia-ml.so.1 of two H200s for tests without one: signatures and structures as in nvml.h.
 * STUB=hang: nvmlInit never returns, as with a driver that is stuck. STUB=lost: the second GPU has fallen off the bus. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };

static int stub(const char *what) { const char *said = getenv("STUB"); return said && !strcmp(said, what); }
static int reach(void *gpu) { return stub("lost") && gpu == (void *)2 ? GPU_IS_LOST : 0; }

int nvmlInitWithFlags(unsigned flags) { while (stub("hang")) pause(); return 0; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
const char *nvmlErrorString(int code) { return code == GPU_IS_LOST ? "GPU is lost" : "Not Supported"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { strcpy(text, "590.48.01"); return 0; }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = 13010; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **gpu) { *gpu = (void *)(uintptr_t)(index + 1); return 0; }
int nvmlDeviceGetName(void *gpu, char *text, unsigned size) { strcpy(text, "NVIDIA H200"); return reach(gpu); }
int nvmlDeviceGetUUID(void *gpu, char *text, unsigned size) { strcpy(text, "GPU-1"); return reach(gpu); }
struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };
int nvmlDeviceGetPciInfo_v3(void *gpu, struct pci *info) {
    memset(info, 0, sizeof *info);
    strcpy(info->bus_id, "00000000:83:00.0");
    return reach(gpu);
}
struct memory { unsigned version; unsigned long long total, reserved, free, used; };
int nvmlDeviceGetMemoryInfo_v2(void *gpu, struct memory *info) {
    info->total = 150754820096ull;
    info->reserved = 614ull << 20;
    info->used = 0;
    return reach(gpu);
}
int nvmlDeviceGetArchitecture(void *gpu, unsigned *value) { *value = 9; return reach(gpu); }
int nvmlDeviceGetEccMode(void *gpu, unsigned *now, unsigned *next) { *now = *next = 1; return reach(gpu); }
int nvmlDeviceGetMigMode(void *gpu, unsigned *now, unsigned *next) { return NOT_SUPPORTED; }
int nvmlDeviceGetTotalEccErrors(void *gpu, int type, int kind, unsigned long long *count) { *count = 0; return reach(gpu); }
int nvmlDeviceGetMemoryErrorCounter(void *gpu, int type, int kind, int place, unsigned long long *count) {
    /* Told apart by what was asked for: corrected errors of DRAM only. */
    *count = type == 0 && kind == 1 && place == 2 ? 42 : 0;
    return reach(gpu);
}
int nvmlDeviceGetRemappedRows(void *gpu, unsigned *correctable, unsigned *uncorrectable, unsigned *pending, unsigned *failed) {
    *correctable = 1, *uncorrectable = 2, *pending = 0, *failed = 0;
    return reach(gpu);
}
int nvmlDeviceGetCurrentClocksEventReasons(void *gpu, unsigned long long *bits) { *bits = 1; return reach(gpu); }
int nvmlDeviceGetTemperature(void *gpu, int sensor, unsigned *degrees) { *degrees = 40; return reach(gpu); }
int nvmlDeviceGetTemperatureThreshold(void *gpu, int which, unsigned *degrees) { return NOT_SUPPORTED; }
struct margin { unsigned version; int degrees; };
int nvmlDeviceGetMarginTemperature(void *gpu, struct margin *left) { left->degrees = 44; return reach(gpu); }
int nvmlDeviceGetCurrPcieLinkGeneration(void *gpu, unsigned *value) { *value = 5; return reach(gpu); }
int nvmlDeviceGetMaxPcieLinkGeneration(void *gpu, unsigned *value) { *value = 5; return reach(gpu); }
int nvmlDeviceGetCurrPcieLinkWidth(void *gpu, unsigned *value) { *value = 16; return reach(gpu); }
int nvmlDeviceGetMaxPcieLinkWidth(void *gpu, unsigned *value) { *value = 16; return reach(gpu); }
struct process { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; };
int nvmlDeviceGetComputeRunningProcesses_v3(void *gpu, unsigned *count, struct process *found) {
    if (!stub("busy"))
        return *count = 0, reach(gpu);
    if (!found)
        return *count = 1, INSUFFICIENT_SIZE;
    *count = 1;
    found[0] = (struct process){.pid = 1, .memory = 1 << 30};
    return 0;
}
struct fabric { unsigned version; unsigned char cluster[16]; unsigned status, clique; unsigned char state; unsigned health; };
int nvmlDeviceGetGpuFabricInfoV(void *gpu, struct fabric *info) {
    memset(info->cluster, 0, sizeof info->cluster);
    info->status = info->clique = info->health = 0;
    info->state = 3;
    return reach(gpu);
}
int nvmlDeviceGetNvLinkState(void *gpu, unsigned link, unsigned *active) { *active = 1; return reach(gpu); }
struct field {
    unsigned id, scope;
    long long timestamp, latency;
    int type, code;
    union { double real; unsigned number; unsigned long long wide; } value;
};
int nvmlDeviceGetFieldValues(void *gpu, int count, struct field *fields) {
    for (int i = 0; i < count; i++) {
        struct field *one = &fields[i];
        one->type = 1;
        one->code = reach(gpu) ? reach(gpu) : one->id == 215 ? NOT_SUPPORTED : 0;
        one->value.number = one->id == 91 ? 18 : one->id == 164 ? 26562 : one->id == 82 ? 44 : 0;
    }
    return 0;
}
