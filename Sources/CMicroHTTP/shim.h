// libmicrohttpd's own header. The library is opened at run time, so nothing here may call its
// functions by name; the inline function calls its variadic one through a pointer.
#ifndef CMICROHTTP_SHIM_H
#define CMICROHTTP_SHIM_H

#include <microhttpd.h>

// Swift does not see the names of enumerations that cannot grow.
enum {
  mhd_argument_kind = MHD_GET_ARGUMENT_KIND,
  mhd_header_kind = MHD_HEADER_KIND,
  mhd_must_copy = MHD_RESPMEM_MUST_COPY,
  mhd_connection_started = MHD_CONNECTION_NOTIFY_STARTED
};

// `function` is the address of MHD_start_daemon or MHD_get_daemon_info.
typedef struct MHD_Daemon *(*mhd_start_function)(
  unsigned int, uint16_t, MHD_AcceptPolicyCallback, void *, MHD_AccessHandlerCallback, void *, ...);

// A daemon without its own thread and listener.
static inline struct MHD_Daemon *mhd_start(
  void *function, unsigned int connection_limit, size_t memory_bytes,
  unsigned int timeout_seconds, MHD_AccessHandlerCallback handler,
  MHD_RequestCompletedCallback completed, MHD_NotifyConnectionCallback changed, void *context) {
  return ((mhd_start_function)function)(
    MHD_USE_EPOLL | MHD_ALLOW_SUSPEND_RESUME | MHD_USE_NO_LISTEN_SOCKET, 0, NULL, NULL, handler,
    context, MHD_OPTION_CONNECTION_LIMIT, connection_limit, MHD_OPTION_CONNECTION_MEMORY_LIMIT,
    memory_bytes, MHD_OPTION_CONNECTION_TIMEOUT, timeout_seconds, MHD_OPTION_NOTIFY_COMPLETED,
    completed, context, MHD_OPTION_NOTIFY_CONNECTION, changed, context, MHD_OPTION_END);
}

// The epoll descriptor of a daemon started as above; -1 if it has none.
typedef const union MHD_DaemonInfo *(*mhd_daemon_info_function)(
  struct MHD_Daemon *, enum MHD_DaemonInfoType, ...);
static inline int mhd_epoll_descriptor(
  void *function, struct MHD_Daemon *daemon) {
  const union MHD_DaemonInfo *info =
    ((mhd_daemon_info_function)function)(daemon, MHD_DAEMON_INFO_EPOLL_FD);
  return info ? info->epoll_fd : -1;
}

#endif
