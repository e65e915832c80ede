import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeSystem
import Synchronization

/// A change to a watched payload.
public enum PayloadChange: Sendable, Equatable {
  /// It is there. Also reported at the start for each that already is.
  case appeared(PayloadInfo)
  /// It has a new version.
  case changed(PayloadInfo)
  /// Nobody holds it any more, or it was removed.
  case vanished(name: String)
}

/// Reports payloads whose names have a prefix to a handler, until it is stopped or released, or its
/// store is closed.
public final class PayloadWatch: Sendable {
  private let loop: PayloadWatchLoop
  private let watches: PayloadWatches

  package init(
    _ directory: StoreDirectory, prefix: String, of watches: PayloadWatches = PayloadWatches(),
    _ handler: @escaping @Sendable (PayloadChange) -> Void
  ) throws(MooncakeError) {
    self.watches = watches
    do throws(Errno) {
      loop = try PayloadWatchLoop(directory, prefix: prefix, handler)
      if try watches.start(loop) { return }
    } catch {
      throw MooncakeError(.system, "cannot watch payloads: \(error)")
    }
    throw MooncakeError(.invalidHandle, "the store was closed")
  }

  deinit { stop() }

  /// Ends the watch. When this returns, its handler is not running, even if others end the watch at
  /// the same time. If a handler of this or another watch of the store calls it, it waits for
  /// nobody: the handler is not called again, but a call already running goes on.
  public func stop() { watches.stop(loop) }
}

/// The thread of a watch.
final class PayloadWatchLoop: Sendable {
  private let follower: PayloadFollower
  private let stopping: EventFD
  private let isStopping = Flag()
  private let thread = Lock<WorkerThread?>(nil)
  /// Whether the thread has been joined or detached, or somebody is joining it.
  private let isReaped = Atomic(false)
  /// 0 while handlers may run.
  private let ended = Futex(1)

  private static let waitMilliseconds: UInt64 = 30_000

  init(
    _ directory: StoreDirectory, prefix: String,
    _ handler: @escaping @Sendable (PayloadChange) -> Void
  ) throws(Errno) {
    stopping = try EventFD()
    follower = PayloadFollower(directory, prefix: prefix) { [isStopping] change in
      if !isStopping.isSet { handler(change) }
    }
  }

  /// Calls `onEnd` when no handler runs any more.
  func start(onEnd: @escaping @Sendable () -> Void) throws(Errno) {
    ended.store(0)
    do throws(Errno) {
      try thread.withLock { thread throws(Errno) in
        thread = try WorkerThread.start(name: "mc-store-watch") { [self] in
          run()
          onEnd()
          ended.store(1)
          ended.wakeAll()
        }
      }
    } catch {
      ended.store(1)
      throw error
    }
  }

  func requestStop() {
    isStopping.set()
    stopping.signal()
  }

  /// Whether the caller is running in the handler.
  var isCurrent: Bool { thread.withLock { $0?.isCurrent ?? false } }

  /// Waits until no handler is running.
  func waitUntilEnded() {
    while ended.value == 0 { ended.wait(while: 0, until: .never) }
    if !isReaped.exchange(true, ordering: .relaxed) { thread.withLock { $0 }?.join() }
  }

  /// Instead of waiting, if the handler itself ends the watch.
  func detach() {
    if !isReaped.exchange(true, ordering: .relaxed) { thread.withLock { $0 }?.detach() }
  }

  private func run() {
    var backoff = Backoff()
    while !isStopping.isSet {
      do throws(MooncakeError) {
        try follower.turn(
          Call(
            until: .after(milliseconds: Self.waitMilliseconds),
            cancellation: stopping.descriptor.rawValue))
        if backoff.isFailing { Log.info("metadata \(follower.uri): payloads are watched again") }
        backoff.succeeded()
      } catch {
        if error.code == .canceled { continue }
        if !backoff.isFailing {
          Log.warning("watching payloads '\(follower.prefix)': \(error.message)")
        }
        backoff.failed()
        _ = Waiting.sleep(
          until: .after(milliseconds: backoff.milliseconds),
          cancellation: stopping.descriptor.rawValue)
      }
    }
  }
}

/// A flag that any thread may set, once.
private final class Flag: Sendable {
  private let value = Atomic(false)
  var isSet: Bool { value.load(ordering: .acquiring) }
  func set() { value.store(true, ordering: .releasing) }
}
