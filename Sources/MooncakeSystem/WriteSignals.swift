import CLinux
import Glibc

/// Runs `body`, which writes to a descriptor provided from outside or calls a library that does. A
/// closed pipe (SIGPIPE) or a file at its size limit (SIGXFSZ) is then an error and never a signal
/// to the host.
package func withoutWriteSignals<Result: ~Copyable, Failure: Error>(
  _ body: () throws(Failure) -> Result
) throws(Failure) -> Result {
  var signals = sigset_t()
  sigemptyset(&signals)
  sigaddset(&signals, SIGPIPE)
  sigaddset(&signals, SIGXFSZ)
  var former = sigset_t()
  var pending = sigset_t()
  sigpending(&pending)
  pthread_sigmask(SIG_BLOCK, &signals, &former)
  defer {
    let error = errno
    // A signal that was pending before belongs to the host.
    if sigismember(&pending, SIGPIPE) != 0 { sigdelset(&signals, SIGPIPE) }
    if sigismember(&pending, SIGXFSZ) != 0 { sigdelset(&signals, SIGXFSZ) }
    var now = timespec()
    while sigtimedwait(&signals, nil, &now) > 0 {}
    pthread_sigmask(SIG_SETMASK, &former, nil)
    errno = error
  }
  return try body()
}
