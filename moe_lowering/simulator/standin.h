/*
 * What the sources of the stand-in runtime have of each other. What runtime.c, capture.c and the functions that
 * standins.py generates share is declared here once; Python finds the same names with ctypes.
 */
#ifndef MOE_STANDIN_H
#define MOE_STANDIN_H

/* runtime.c. From now on operators on the device have kernels. */
void moe_standin_device_computes(void);
/* Each notes what aclGetRecentErrMsg says, and returns the error that its caller returns. */
int moe_standin_unsupported(const char *function);
int moe_standin_refused(const char *function, const char *reason);
/* For a function that has no error to return: writes to stderr, and does not return. */
void moe_standin_abort(const char *function);

/* capture.c. Nonzero, the error to return, when a capture is under way that forbids the call. */
int moe_standin_forbidden(const char *function, int relaxed_allows);
int moe_standin_query_forbidden(const char *function, const void *stream, const void *event);

#endif
