import MooncakeEngine
import MooncakeSystem
import Synchronization

/// What happened to a payload that is watched.
public enum PayloadChange: Sendable, Equatable {
  /// It is there; also told of all that are there in the beginning.
  case appeared(PayloadInfo)
  /// It has another version.
  case changed(PayloadInfo)
  /// Nobody holds it any more, or it was removed.
  case vanished(name: String)
}

/// Tells a handler of payloads whose names have a prefix, until it is stopped or released, or its
/// store is closed.
public final class PayloadWatch: Sendable {
  private let loop: PayloadWatchLoop
  private let watches: PayloadWatches

  package init(
    _ directory: StoreDirectory, prefix: String, of watches: PayloadWatches = PayloadWatches(),
    _ handler: @escaping @Sendable (PayloadChange) -> Void
  ) throws(EngineError) {
    self.watches = watches
    do throws(Errno) {
      loop = try PayloadWatchLoop(directory, prefix: prefix, handler)
      if try watches.start(loop) { return }
    } catch {
      throw EngineError(.system, "cannot watch payloads: \(error)")
    }
    throw EngineError(.invalidHandle, "the store was closed")
  }

  deinit { stop() }

  /// Ends the watch. No handler runs when this returns, whoever else ends it at the same time;
  /// called by the handler, none runs again.
  public func stop() { watches.stop(loop) }
}

/// The thread of a watch.
final class PayloadWatchLoop: Sendable {
  private let directory: StoreDirectory
  private let prefix: String
  private let handler: @Sendable (PayloadChange) -> Void
  private let stopping: EventFD
  private let isStopping = Atomic(false)
  private let thread = Lock<WorkerThread?>(nil)
  /// Whether somebody joins or has detached the thread.
  private let isReaped = Atomic(false)
  /// 0 while handlers may run.
  private let ended = Futex(1)

  /// What has been told, by name.
  private struct Known {
    var head: PayloadHead
    /// Its head is gone; told as vanished only once nobody holds it.
    var isHeadless = false
  }

  private static let waitMilliseconds: UInt64 = 30_000
  private static let recheckMilliseconds: UInt64 = 1000
  private static let firstBackoffMilliseconds: UInt64 = 100
  private static let maximumBackoffMilliseconds: UInt64 = 1000

  init(
    _ directory: StoreDirectory, prefix: String,
    _ handler: @escaping @Sendable (PayloadChange) -> Void
  ) throws(Errno) {
    self.directory = directory
    self.prefix = prefix
    self.handler = handler
    stopping = try EventFD()
  }

  func start() throws(Errno) {
    ended.store(0)
    do throws(Errno) {
      try thread.withLock { thread throws(Errno) in
        thread = try WorkerThread.start(name: "mc-store-watch") { [self] in
          run()
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
    isStopping.store(true, ordering: .releasing)
    stopping.signal()
  }

  /// Whether the caller is the handler.
  var isCurrent: Bool { thread.withLock { $0?.isCurrent ?? false } }

  /// Waits until no handler runs any more.
  func waitUntilEnded() {
    while ended.value == 0 { ended.wait(while: 0, until: .never) }
    if !isReaped.exchange(true, ordering: .relaxed) { thread.withLock { $0 }?.join() }
  }

  /// Instead of waiting, where the handler itself ends the watch.
  func detach() {
    if !isReaped.exchange(true, ordering: .relaxed) { thread.withLock { $0 }?.detach() }
  }

  private func run() {
    let watch = MetadataWatch(directory.store, prefix: directory.headKey(prefix))
    var known: [MetadataKey: Known] = [:]
    var backoff: UInt64 = 0
    var nextCheck = Deadline.never
    // A service that comes back may have lost what its holders are about to put again.
    var patience = Deadline(nanoseconds: 0)
    while !isStopping.load(ordering: .acquiring) {
      do throws(EngineError) {
        for change in try watch.next(call(until: nextCheck)) { take(change, &known) }
        let isLeft = try recheck(&known, patience)
        nextCheck = isLeft ? .after(milliseconds: Self.recheckMilliseconds) : .never
        if backoff > 0 { Log.info("metadata \(directory.uri): payloads are watched again") }
        backoff = 0
      } catch {
        if error.code == .canceled { continue }
        patience = .after(milliseconds: directory.ttlMilliseconds)
        if backoff == 0 { Log.warning("watching payloads '\(prefix)': \(error.message)") }
        backoff = min(
          Self.maximumBackoffMilliseconds, max(Self.firstBackoffMilliseconds, backoff * 2))
        _ = Waiting.sleep(
          until: .after(milliseconds: backoff), cancellation: stopping.descriptor.rawValue)
      }
    }
  }

  private func call(until deadline: Deadline) -> MetadataCall {
    MetadataCall(
      until: min(deadline, .after(milliseconds: Self.waitMilliseconds)),
      cancellation: stopping.descriptor.rawValue)
  }

  private func tell(_ change: PayloadChange) {
    if !isStopping.load(ordering: .acquiring) { handler(change) }
  }

  private func take(_ change: MetadataChange, _ known: inout [MetadataKey: Known]) {
    let head: PayloadHead? =
      switch change {
      case .put(let entry): try? PayloadHead(json: entry.value)
      case .delete: nil
      }
    let key = MetadataKey(String(change.key.dropFirst(directory.headPrefix.count)))
    // What is malformed counts as absent.
    guard let head, MetadataKey(head.name) == key else {
      known[key]?.isHeadless = true
      return
    }
    let former = known.updateValue(Known(head: head), forKey: key)
    // Another holder that stands for the same version is no news.
    if former?.head.version == head.version { return }
    let info = head.summary.info(holderCount: 1)
    tell(former == nil ? .appeared(info) : .changed(info))
  }

  /// Tells of those that are gone; returns whether some are left to look at again.
  private func recheck(
    _ known: inout [MetadataKey: Known], _ patience: Deadline
  ) throws(EngineError) -> Bool {
    var isLeft = false
    for (key, payload) in known where payload.isHeadless {
      let name = payload.head.name
      let removed = try directory.removedVersion(name, call(until: .never))
      let isHeld = try directory.hasHolders(name, call(until: .never))
      if (isHeld || !patience.hasPassed) && removed != payload.head.version {
        isLeft = true
        continue
      }
      known[key] = nil
      tell(.vanished(name: name))
    }
    return isLeft
  }
}
