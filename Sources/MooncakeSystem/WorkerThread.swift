import CLinux
import Glibc

/// A thread of the library: named, with every signal blocked so that the host's handlers never run
/// on it.
package final class WorkerThread: @unchecked Sendable {
  // Unchecked: `handle` is written once before the object is shared, and only the thread uses
  // `body`.
  private var handle = pthread_t()
  /// Cleared when it starts: its captures may retain this object, and the cycle would keep them
  /// alive.
  private var body: (@Sendable () -> Void)?
  private let name: String
  private let processors: ProcessorSet?

  private init(name: String, on processors: ProcessorSet?, body: @escaping @Sendable () -> Void) {
    self.name = name
    self.processors = processors
    self.body = body
  }

  /// Starts a thread, bound to `processors` if given; end it with `join` or `detach`, exactly once.
  package static func start(
    name: String, on processors: ProcessorSet? = nil, _ body: @escaping @Sendable () -> Void
  ) throws(Errno) -> WorkerThread {
    let thread = WorkerThread(name: name, on: processors, body: body)
    try thread.launch(detached: false)
    return thread
  }

  /// Starts a thread that nobody joins.
  package static func startDetached(
    name: String, _ body: @escaping @Sendable () -> Void
  ) throws(Errno) {
    try WorkerThread(name: name, on: nil, body: body).launch(detached: true)
  }

  /// Waits until the thread has ended.
  package func join() { pthread_join(handle, nil) }

  /// Instead of `join`: the thread's resources are freed when it ends.
  package func detach() { pthread_detach(handle) }

  /// Whether the caller runs on this thread.
  package var isCurrent: Bool { pthread_equal(handle, pthread_self()) != 0 }

  private func launch(detached: Bool) throws(Errno) {
    var all = sigset_t()
    var before = sigset_t()
    sigfillset(&all)
    // A new thread inherits the mask; the caller gets its own back below.
    pthread_sigmask(SIG_SETMASK, &all, &before)
    defer { pthread_sigmask(SIG_SETMASK, &before, nil) }

    var attributes = pthread_attr_t()
    pthread_attr_init(&attributes)
    defer { pthread_attr_destroy(&attributes) }
    if detached { pthread_attr_setdetachstate(&attributes, Int32(PTHREAD_CREATE_DETACHED)) }

    let context = Unmanaged.passRetained(self)
    let result = pthread_create(
      &handle, &attributes,
      { argument in
        let thread = Unmanaged<WorkerThread>.fromOpaque(argument!).takeRetainedValue()
        pthread_setname_np(pthread_self(), String(thread.name.prefix(15)))
        if let processors = thread.processors { try? processors.bindCurrentThread() }
        let body = thread.body
        thread.body = nil
        body?()
        return nil
      }, context.toOpaque())
    if result != 0 {
      context.release()
      throw Errno(result, call: "pthread_create")
    }
  }
}
