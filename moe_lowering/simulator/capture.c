/*
 * NPU graph capture of the stand-in runtime: which streams are being captured, what a capture forbids, and the models.
 *
 * Contract. One capture at a time, as torch_npu requires. It begins on one stream; another stream joins when it waits
 * for an event that was recorded on a stream of the capture. What the streams do is not known here: the kernels are
 * Python's (moe_lowering/simulator/device), which keeps the tape and registers itself with moe_standin_set_hooks. As
 * long as it has not, no capture can begin. A call that a capture forbids fails by name, with a code that torch_npu
 * raises on, and the capture is invalid from then on: it can be ended, and its model refuses to run. A model is a small
 * number, given out once.
 */
#include <acl/acl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "standin.h"

#define STREAMS 64
#define EVENTS 4096

typedef struct {
    int (*begin)(uint64_t model, uintptr_t stream);
    int (*end)(uint64_t model);
    int (*execute)(uint64_t model, uintptr_t stream);
    void (*destroy)(uint64_t model);
    void (*forbidden)(const char *function, const char *reason);
    void (*record)(uintptr_t event, uintptr_t stream);
    void (*wait)(uintptr_t stream, uintptr_t event);
    int (*value)(int waits, uintptr_t address, uint64_t value, uintptr_t stream);
    int (*group)(int action, uintptr_t stream, uintptr_t *handle);
} hooks_t;

enum { GROUP_BEGIN, GROUP_END, UPDATE_BEGIN, UPDATE_END }; /* of a group of tasks */

static hooks_t hooks;
static uint64_t models, begun, replayed;
static uint64_t current;  /* the model that is being captured, 0 when none is */
static int mode, invalid;
static _Thread_local int thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
static uintptr_t streams[STREAMS], events[EVENTS]; /* of the capture; streams[0] is where it began */
static size_t stream_count, event_count;

void moe_standin_set_hooks(const hooks_t *given) { hooks = *given; }
uint64_t moe_standin_captures_begun(void) { return begun; }
uint64_t moe_standin_replays(void) { return replayed; }

static int contains(const uintptr_t *list, size_t count, const void *item)
{
    for (size_t i = 0; i < count; i++)
        if (list[i] == (uintptr_t)item)
            return 1;
    return 0;
}

int moe_standin_is_captured(aclrtStream stream) { return current && contains(streams, stream_count, stream); }

/* A failure that spoils the capture under way, if there is one. Python notes the line of the model, and keeps the first. */
static int spoiled(const char *function, const char *reason)
{
    if (current) {
        invalid = 1;
        hooks.forbidden(function, reason);
    }
    return moe_standin_refused(function, reason);
}

/* What runtime.c asks first in every call that waits for the device, or allocates. */
int moe_standin_forbidden(const char *function, int relaxed_allows)
{
    if (!current || invalid || (relaxed_allows && thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED))
        return current && invalid && !relaxed_allows ? moe_standin_refused(function, "the capture is invalid") : 0;
    if (relaxed_allows && mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED)
        return 0;
    return spoiled(function, "not allowed while an NPU graph is captured: it waits for the device or the host");
}

/* The same for a question whether a stream has finished: one of the capture never has. Others may be asked where the mode
 * is relaxed. */
int moe_standin_query_forbidden(const char *function, const void *stream, const void *event)
{
    int captured = contains(streams, stream_count, stream) || contains(events, event_count, event);
    return moe_standin_forbidden(function, !captured);
}

/* Python found an error of its own: the capture cannot be used. */
void moe_standin_invalidate(void) { invalid = 1; }

aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode how)
{
    begun++;
    if (!hooks.begin)
        return moe_standin_refused(__func__, "nothing is captured after moe_lowering.simulator.enable() alone. Give torch.compile "
                                             "options={\"force_eager\": True}, with which the graph runs and is not captured, or "
                                             "call moe_lowering.simulator.enable_device() in place of enable()");
    if (current)
        return spoiled(__func__, "begins a capture inside a capture");
    current = ++models;
    mode = how;
    invalid = 0;
    stream_count = event_count = 0;
    streams[stream_count++] = (uintptr_t)stream;
    return hooks.begin(current, (uintptr_t)stream);
}

aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI *model)
{
    if (!current || streams[0] != (uintptr_t)stream)
        return spoiled(__func__, "no capture began on this stream");
    uint64_t done = current;
    current = 0;
    *model = (aclmdlRI)(uintptr_t)done;
    return hooks.end(done);
}

aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus *status, aclmdlRI *model)
{
    int captured = moe_standin_is_captured(stream);
    *status = captured ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    *model = (aclmdlRI)(uintptr_t)(captured ? current : 0);
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *how)
{
    int before = thread_mode;
    thread_mode = *how;
    *how = before;
    return ACL_SUCCESS;
}

aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream)
{
    if (current) /* on another stream too: as a launch, it is not ordered with the capture */
        return spoiled(__func__, "replays a graph inside a capture, which is not simulated");
    replayed++;
    return hooks.execute((uint64_t)(uintptr_t)model, (uintptr_t)stream);
}

aclError aclmdlRIDestroy(aclmdlRI model)
{
    hooks.destroy((uint64_t)(uintptr_t)model);
    return ACL_SUCCESS;
}

aclError aclmdlRIGetId(aclmdlRI model, uint32_t *id)
{
    *id = (uint32_t)(uintptr_t)model;
    return ACL_SUCCESS;
}

/* A group of tasks of a captured graph can be launched anew with other arguments, which the graph then has. */

static aclError group(const char *function, int action, aclrtStream stream, aclrtTaskGrp *handle)
{
    if (!hooks.group)
        return moe_standin_unsupported(function);
    return hooks.group(action, (uintptr_t)stream, (uintptr_t *)handle);
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream) { return group(__func__, GROUP_BEGIN, stream, NULL); }

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp *handle)
{
    return group(__func__, GROUP_END, stream, handle);
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream stream, aclrtTaskGrp handle)
{
    return group(__func__, UPDATE_BEGIN, stream, &handle);
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream stream) { return group(__func__, UPDATE_END, stream, NULL); }

/* Words of memory that streams write, and wait for: torch_npu's external events, which a graph waits for when it runs. */

aclError aclrtValueWrite(void *address, uint64_t value, uint32_t flag, aclrtStream stream)
{
    return hooks.value ? hooks.value(0, (uintptr_t)address, value, (uintptr_t)stream) : moe_standin_unsupported(__func__);
}

aclError aclrtValueWait(void *address, uint64_t value, uint32_t flag, aclrtStream stream)
{
    if (flag != 1) /* the mode that torch_npu asks for: until the word is equal */
        return moe_standin_unsupported("aclrtValueWait in another mode than 1");
    return hooks.value ? hooks.value(1, (uintptr_t)address, value, (uintptr_t)stream) : moe_standin_unsupported(__func__);
}

/* Events order streams; only inside a capture does that have an effect, since all else has finished when it returns. */

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream)
{
    size_t at = 0;
    while (at < event_count && events[at] != (uintptr_t)event)
        at++;
    if (!moe_standin_is_captured(stream)) {
        if (at < event_count)
            events[at] = events[--event_count];
        return ACL_SUCCESS;
    }
    if (at == EVENTS)
        return spoiled(__func__, "more events in one capture than this stand-in keeps");
    if (at == event_count)
        events[event_count++] = (uintptr_t)event;
    hooks.record((uintptr_t)event, (uintptr_t)stream);
    return ACL_SUCCESS;
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event)
{
    if (!current || !contains(events, event_count, event))
        return ACL_SUCCESS; /* recorded outside of the capture: complete */
    if (!moe_standin_is_captured(stream)) {
        if (stream_count == STREAMS)
            return spoiled(__func__, "more streams in one capture than this stand-in keeps");
        streams[stream_count++] = (uintptr_t)stream;
    }
    hooks.wait((uintptr_t)stream, (uintptr_t)event);
    return ACL_SUCCESS;
}

/* Cores that a stream may use: kept, so that npugraph_ex can compare them, and without effect. 24 cubes and 48 vectors
 * are what one die of A3 has. */

static struct { uintptr_t stream; uint32_t cores[2]; } limits[STREAMS];
static size_t limit_count;
static const uint32_t ALL_CORES[2] = {24, 48};

aclError aclrtGetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t *value)
{
    *value = ALL_CORES[type == ACL_RT_DEV_RES_VECTOR_CORE];
    for (size_t i = 0; i < limit_count; i++)
        if (limits[i].stream == (uintptr_t)stream)
            *value = limits[i].cores[type == ACL_RT_DEV_RES_VECTOR_CORE];
    return ACL_SUCCESS;
}

aclError aclrtSetStreamResLimit(aclrtStream stream, aclrtDevResLimitType type, uint32_t value)
{
    size_t at = 0;
    while (at < limit_count && limits[at].stream != (uintptr_t)stream)
        at++;
    if (at == STREAMS)
        return moe_standin_refused(__func__, "more streams with limits than this stand-in keeps");
    if (at == limit_count) {
        limits[limit_count].stream = (uintptr_t)stream;
        memcpy(limits[limit_count++].cores, ALL_CORES, sizeof ALL_CORES);
    }
    limits[at].cores[type == ACL_RT_DEV_RES_VECTOR_CORE] = value;
    return ACL_SUCCESS;
}

aclError aclrtResetStreamResLimit(aclrtStream stream)
{
    for (size_t i = 0; i < limit_count; i++)
        if (limits[i].stream == (uintptr_t)stream)
            limits[i] = limits[--limit_count];
    return ACL_SUCCESS;
}

aclError aclrtUseStreamResInCurrentThread(aclrtStream stream) { return ACL_SUCCESS; }
aclError aclrtUnuseStreamResInCurrentThread(aclrtStream stream) { return ACL_SUCCESS; }

aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t *value)
{
    *value = ALL_CORES[type == ACL_RT_DEV_RES_VECTOR_CORE];
    return ACL_SUCCESS;
}
