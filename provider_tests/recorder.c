/*
 * A stand-in for CANN's libopapi.so that records which aclnn entry is called, and with which arguments in which order.
 *
 * recorder.py generates one ENTRY for each aclnn name that a library looks up by name. Such an entry has two functions:
 * NAMEGetWorkspaceSize(arguments..., uint64_t *size, aclOpExecutor **executor), which says what is to be done, and
 * NAME(workspace, size, executor, stream), which does it. Neither computes anything here, and no output is written.
 *
 * How arguments are read without a prototype. The psABI passes integers and pointers in the first registers (6 on
 * x86-64, 8 on AArch64), floating point numbers in 8 of their own, the rest on the stack in 8 bytes each. A function
 * that declares as many integers, then 8 doubles, then integers therefore receives the integers and pointers of any
 * call in their order, and apart from them the doubles in theirs. Where arguments end is where two addresses of the
 * caller's stack follow each other: size and executor, which it declares as variables with 0 in them. A call without them
 * is kept as it is, so that a test fails.
 *
 * A slot is written down as a number; as the object whose handle it is, when one is alive; and as text, when it points to
 * text. Which of them counts is what the documentation of the entry says. One line of JSON for each event.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#if defined(__x86_64__)
#define INTEGERS long a0, long a1, long a2, long a3, long a4, long a5
#define INTEGER_VALUES a0, a1, a2, a3, a4, a5
#elif defined(__aarch64__)
#define INTEGERS long a0, long a1, long a2, long a3, long a4, long a5, long a6, long a7
#define INTEGER_VALUES a0, a1, a2, a3, a4, a5, a6, a7
#else
#error "how this machine passes arguments is not written down here"
#endif
#define DOUBLES double d0, double d1, double d2, double d3, double d4, double d5, double d6, double d7
#define DOUBLE_VALUES d0, d1, d2, d3, d4, d5, d6, d7
#define STACK long s0, long s1, long s2, long s3, long s4, long s5, long s6, long s7, long s8, long s9, long s10, \
    long s11, long s12, long s13, long s14, long s15, long s16, long s17, long s18, long s19, long s20, long s21
#define STACK_VALUES s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, s16, s17, s18, s19, s20, s21
#define TEXT_BYTES 128

enum kind { TENSOR, TENSOR_LIST, INT_ARRAY };

/* What a handle stands for. Never freed: a handle that is used after it was destroyed must not become another one's. */
struct object {
    enum kind kind;
    int alive;
    int dtype, format;
    uint64_t count, storage_count;
    int64_t *sizes, *strides, *storage; /* of a tensor; the values of an array are its sizes */
    int64_t offset;
    void *data;
    struct object **members;
    struct object *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct object *objects;
static char *text, *taken;
static size_t length, capacity;
static long calls;

static void say(const char *format, ...)
{
    char part[512];
    va_list values;
    va_start(values, format);
    int size = vsnprintf(part, sizeof part, format, values);
    va_end(values);
    if (size < 0 || (size_t)size >= sizeof part)
        abort();
    if (length + size + 1 > capacity) {
        capacity = 2 * (capacity + size + 1);
        text = realloc(text, capacity);
        if (!text)
            abort();
    }
    memcpy(text + length, part, size + 1);
    length += size;
}

static void *copy_of(const void *from, size_t bytes)
{
    void *to = malloc(bytes ? bytes : 1);
    if (!to)
        abort();
    return bytes ? memcpy(to, from, bytes) : to;
}

static struct object *make(enum kind kind, uint64_t count)
{
    struct object *object = calloc(1, sizeof *object);
    if (!object)
        abort();
    object->kind = kind;
    object->alive = 1;
    object->count = count;
    pthread_mutex_lock(&lock);
    object->next = objects;
    objects = object;
    pthread_mutex_unlock(&lock);
    return object;
}

static struct object *known(const void *handle)
{
    struct object *object = objects;
    while (object && (object != handle || !object->alive))
        object = object->next;
    return object;
}

static int destroy(const void *handle)
{
    pthread_mutex_lock(&lock);
    struct object *object = known(handle);
    if (object)
        object->alive = 0;
    pthread_mutex_unlock(&lock);
    return object ? 0 : 1;
}

/* CANN's functions for objects; the declarations are those of its aclnn/acl_meta.h, which torch_npu does not carry. */

void *aclCreateTensor(const int64_t *sizes, uint64_t dims, int dtype, const int64_t *strides, int64_t offset, int format,
                      const int64_t *storage_sizes, uint64_t storage_dims, void *data)
{
    struct object *object = make(TENSOR, dims);
    object->dtype = dtype;
    object->sizes = copy_of(sizes, dims * sizeof *sizes);
    object->strides = copy_of(strides, dims * sizeof *strides);
    object->storage = copy_of(storage_sizes, storage_dims * sizeof *storage_sizes);
    object->storage_count = storage_dims;
    object->format = format;
    object->offset = offset;
    object->data = data;
    return object;
}

void *aclCreateTensorList(const void *const *tensors, uint64_t count)
{
    struct object *object = make(TENSOR_LIST, count);
    object->members = copy_of(tensors, count * sizeof *tensors);
    return object;
}

void *aclCreateIntArray(const int64_t *values, uint64_t count)
{
    struct object *object = make(INT_ARRAY, count);
    object->sizes = copy_of(values, count * sizeof *values);
    return object;
}

int aclDestroyTensor(const void *handle) { return destroy(handle); }
int aclDestroyIntArray(const void *handle) { return destroy(handle); }

int aclDestroyTensorList(const void *handle) /* and its tensors, as CANN does */
{
    struct object *object = known(handle);
    for (uint64_t i = 0; object && i < object->count; i++)
        destroy(object->members[i]);
    return destroy(handle);
}

/* Writing down. */

static void say_numbers(const char *name, const int64_t *values, uint64_t count)
{
    say("\"%s\": [", name);
    for (uint64_t i = 0; i < count; i++)
        say("%s%ld", i ? ", " : "", (long)values[i]);
    say("]");
}

static void say_object(const struct object *object)
{
    if (!object) {
        say("null");
    } else if (object->kind == TENSOR) {
        say("{\"kind\": \"tensor\", \"dtype\": %d, \"format\": %d, \"offset\": %ld, \"data\": %lu, ", object->dtype,
            object->format, (long)object->offset, (unsigned long)object->data);
        say_numbers("sizes", object->sizes, object->count);
        say(", ");
        say_numbers("strides", object->strides, object->count);
        say(", ");
        say_numbers("storage", object->storage, object->storage_count);
        say("}");
    } else if (object->kind == TENSOR_LIST) {
        say("{\"kind\": \"tensors\", \"members\": [");
        for (uint64_t i = 0; i < object->count; i++) {
            say(i ? ", " : "");
            say_object(known(object->members[i]));
        }
        say("]}");
    } else {
        say("{\"kind\": \"integers\", ");
        say_numbers("values", object->sizes, object->count);
        say("}");
    }
}

/* The text at an address, read by the kernel, which does not fault; nothing when it is none. */
static void say_text(long address)
{
    char found[TEXT_BYTES];
    struct iovec to = {found, sizeof found}, from = {(void *)address, sizeof found};
    ssize_t size = process_vm_readv(getpid(), &to, 1, &from, 1, 0);
    if (size <= 0) { /* the end of the mapping may be near */
        from.iov_len = to.iov_len = 4096 - (address & 4095) < TEXT_BYTES ? 4096 - (address & 4095) : 1;
        size = process_vm_readv(getpid(), &to, 1, &from, 1, 0);
    }
    const char *end = size > 0 ? memchr(found, 0, size) : NULL;
    if (!end)
        return;
    for (const char *c = found; c < end; c++)
        if (*c < ' ' || *c > '~' || *c == '"' || *c == '\\')
            return;
    say(", \"text\": \"%s\"", found);
}

static int on_stack(long address)
{
    pthread_attr_t attributes;
    void *lowest;
    size_t size;
    if (pthread_getattr_np(pthread_self(), &attributes))
        return 0;
    pthread_attr_getstack(&attributes, &lowest, &size);
    pthread_attr_destroy(&attributes);
    return (char *)address >= (char *)&size && (char *)address < (char *)lowest + size && address % 8 == 0;
}

static int record(const char *name, const long *slots, int count, const double *doubles)
{
    int end = 0; /* both variables are 0 before the call */
    while (end + 1 < count && !(on_stack(slots[end]) && on_stack(slots[end + 1]) && *(const long *)slots[end] == 0 &&
                                *(const long *)slots[end + 1] == 0))
        end++;
    int ended = end + 1 < count;
    pthread_mutex_lock(&lock);
    long number = ++calls;
    say("{\"event\": \"sizes\", \"entry\": \"%s\", \"number\": %ld, \"ended\": %s, \"slots\": [", name, number,
        ended ? "true" : "false");
    for (int i = 0; i < (ended ? end : count); i++) {
        say("%s{\"number\": %ld", i ? ", " : "", slots[i]);
        const struct object *object = known((void *)slots[i]);
        if (object) {
            say(", \"object\": ");
            say_object(object);
        } else {
            say_text(slots[i]);
        }
        say("}");
    }
    say("], \"doubles\": [");
    for (int i = 0; i < 8; i++) {
        uint64_t bits;
        memcpy(&bits, doubles + i, sizeof bits);
        say("%s%lu", i ? ", " : "", (unsigned long)bits);
    }
    say("]}\n");
    if (ended) {
        *(uint64_t *)slots[end] = 0;
        *(long *)slots[end + 1] = number; /* the executor, which the second function is given */
    }
    pthread_mutex_unlock(&lock);
    return 0;
}

static int launch(const char *name, void *workspace, uint64_t size, long executor, void *stream)
{
    pthread_mutex_lock(&lock);
    say("{\"event\": \"launch\", \"entry\": \"%s\", \"number\": %ld}\n", name, executor);
    pthread_mutex_unlock(&lock);
    return 0;
}

/* For recorder.py: the lines since it was last asked. Valid until it asks again. */
const char *moe_recorder_take(void)
{
    pthread_mutex_lock(&lock);
    free(taken);
    taken = text;
    text = NULL;
    length = capacity = 0;
    pthread_mutex_unlock(&lock);
    return taken ? taken : "";
}

#define ENTRY(name) \
    int name##GetWorkspaceSize(INTEGERS, DOUBLES, STACK) \
    { \
        const long slots[] = {INTEGER_VALUES, STACK_VALUES}; \
        const double doubles[] = {DOUBLE_VALUES}; \
        return record(#name, slots, sizeof slots / sizeof *slots, doubles); \
    } \
    int name(void *workspace, uint64_t size, long executor, void *stream) \
    { \
        return launch(#name, workspace, size, executor, stream); \
    }
