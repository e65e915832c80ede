// What happens on SIGTERM, SIGINT and exit() after enableGracefulShutdown().
import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Destroys the engines that asked for it before the process ends.
enum GracefulShutdown {
  /// The process whose watcher thread is running: a forked child inherits handlers but no thread.
  private static let owner = Atomic<pid_t>(0)
  /// 0, or the signal that arrived.
  private static let request = Futex()
  private static let exitHandler: Int32 = atexit { endEngines() }

  static func prepare() {
    _ = request.value
    _ = exitHandler
  }

  /// Installs the handlers and starts the watcher, once per process.
  static func enable() throws(MooncakeError) {
    let process = getpid()
    let former = owner.load(ordering: .acquiring)
    if former == process { return }
    // Create the word before the handlers that use it.
    request.store(0)
    if exitHandler != 0 { throw MooncakeError(.outOfMemory, "atexit() refused a handler") }
    let (exchanged, _) = owner.compareExchange(
      expected: former, desired: process, ordering: .acquiringAndReleasing)
    if !exchanged { return }
    do throws(Errno) {
      try WorkerThread.startDetached(name: "mooncake-exit") { watch() }
    } catch {
      owner.store(0, ordering: .releasing)
      throw MooncakeError(.system, "the thread that waits for signals could not start: \(error)")
    }
    var action = sigaction()
    action.__sigaction_handler.sa_handler = { GracefulShutdown.handle($0) }
    action.sa_flags = Int32(SA_RESTART)
    sigemptyset(&action.sa_mask)
    sigaction(SIGTERM, &action, nil)
    sigaction(SIGINT, &action, nil)
  }

  /// Runs as the signal handler, so it must not allocate, lock or log.
  private static func handle(_ signal: Int32) {
    let before = errno
    defer { errno = before }
    if owner.load(ordering: .acquiring) != getpid() {
      // This process has no watcher; the default action follows when the handler returns.
      _ = Glibc.signal(signal, SIG_DFL)
      raise(signal)
      return
    }
    // A second signal means that somebody does not want to wait for the orderly end.
    if request.exchange(UInt32(bitPattern: signal)) != 0 { _exit(128 &+ signal) }
    request.wakeAll()
  }

  private static func watch() {
    while request.value == 0 { request.wait(while: 0, until: .never) }
    endEngines()
    _exit(128 &+ Int32(bitPattern: request.value))
  }

  private static func endEngines() {
    let handles = EngineTable.shared.handles(.dropIn) { record in
      record.dropIn.endsWithProcess.load(ordering: .acquiring)
    }
    for handle in handles {
      // Another thread may be destroying it already.
      try? EngineTable.shared.destroy(handle, .dropIn)
    }
  }
}
