/* For tests only: a libcuda.so.1 for machines without NVIDIA's driver, where every call answers "not initialised" (3).
   KvikIO looks its symbols up when it is first used, also for host memory; nothing here says anything about a GPU. */
#define CALL(name) int name(void) { return 3; }
#define BOTH(name) CALL(name) CALL(name##_v2)
CALL(cuInit) CALL(cuGetProcAddress) CALL(cuGetProcAddress_v2)
CALL(cuDeviceGet) CALL(cuDeviceGetCount) CALL(cuDeviceGetAttribute) CALL(cuDeviceGetName) CALL(cuDeviceGetUuid)
CALL(cuDeviceGetPCIBusId) CALL(cuDevicePrimaryCtxRetain) BOTH(cuDevicePrimaryCtxRelease)
BOTH(cuCtxCreate) BOTH(cuCtxDestroy) BOTH(cuCtxPushCurrent) BOTH(cuCtxPopCurrent)
CALL(cuCtxGetCurrent) CALL(cuCtxSetCurrent) CALL(cuCtxGetDevice) CALL(cuCtxSynchronize)
BOTH(cuMemAlloc) BOTH(cuMemFree) CALL(cuMemHostAlloc) CALL(cuMemFreeHost) BOTH(cuMemHostRegister)
CALL(cuMemHostUnregister) BOTH(cuMemHostGetDevicePointer) BOTH(cuMemGetAddressRange)
BOTH(cuMemcpyHtoD) BOTH(cuMemcpyDtoH) BOTH(cuMemcpyHtoDAsync) BOTH(cuMemcpyDtoHAsync) CALL(cuMemcpyAsync)
BOTH(cuMemcpyBatchAsync) CALL(cuPointerGetAttribute) CALL(cuPointerGetAttributes)
CALL(cuStreamCreate) BOTH(cuStreamDestroy) CALL(cuStreamSynchronize) CALL(cuStreamQuery)
CALL(cuEventCreate) BOTH(cuEventDestroy) CALL(cuEventRecord) CALL(cuEventSynchronize) CALL(cuEventQuery)
int cuGetErrorName(int code, const char **name) { (void)code; *name = "CUDA_ERROR_NOT_INITIALIZED"; return 0; }
int cuGetErrorString(int code, const char **text) { (void)code; *text = "not initialised (test stub)"; return 0; }
CALL(cuLaunchHostFunc)
/* While it looks symbols up, KvikIO asks for the version, and waits for itself for ever when that is an error. */
int cuDriverGetVersion(int *version) { *version = 12000; return 0; }
