import MooncakeEngine
import MooncakeSystem

/// Reads the manifest of a version from whoever has it. One holder is asked first; while nobody
/// answers, more are asked soon, so that silent ones hold nobody up.
struct ManifestSearch {
  /// What came out, for whoever asks the same holders next.
  struct Outcome {
    var manifest: Manifest
    var source: HolderAddress
    /// Asked, and silent so far.
    var silent: Set<HolderAddress>
  }

  private final class Inbox: Sendable {
    enum News: Sendable {
      case reached(HolderAddress)
      case read(HolderAddress, Manifest)
      case failed(HolderAddress, EngineError)
    }
    private let news = Lock<[News]>([])
    let event: EventFD
    init() throws(Errno) { event = try EventFD() }

    func put(_ item: News) {
      news.withLock { $0.append(item) }
      event.signal()
    }

    func take() -> [News] {
      event.clear()
      return news.withLock { news in
        defer { news = [] }
        return news
      }
    }
  }

  private let engine: TransferEngine
  private let workers: WorkerPool
  private let version: PayloadVersion
  private let bounds: Bounds
  private var waiting: [HolderRecord]
  private var silent: Set<HolderAddress> = []
  /// Have answered where it lies; it is being read from them.
  private var reached: Set<HolderAddress> = []
  private var failures: [String] = []
  private var code = EngineError.Code.noHolder

  private static let askMilliseconds: UInt64 = 2000
  private static let stepNanoseconds: UInt64 = 50_000_000
  /// A manifest on its way is waited for so long before others are asked, too.
  private static let readNanoseconds: UInt64 = 1_000_000_000
  private static let stepCount = 4
  private static let phase = "fetching the manifest"

  init(
    _ engine: TransferEngine, _ workers: WorkerPool, _ holders: [HolderRecord],
    _ version: PayloadVersion, _ bounds: Bounds
  ) {
    self.engine = engine
    self.workers = workers
    self.version = version
    self.bounds = bounds
    // Every receiver begins with another holder; the origin, which all know, comes last.
    waiting = holders.shuffled().sorted { $0.isOrigin && !$1.isOrigin }
  }

  /// `name` is the payload's, for messages.
  mutating func run(_ name: String) throws(EngineError) -> Outcome {
    let inbox: Inbox
    do throws(Errno) { inbox = try Inbox() } catch {
      throw EngineError(.system, "making an event descriptor: \(error)")
    }
    var next: UInt64 = 0
    var count = 1
    while true {
      try bounds.check(Self.phase)
      let now = Clock.now()
      if now >= next && !waiting.isEmpty {
        for _ in 0..<count { start(inbox) }
        (next, count) = (now &+ Self.stepNanoseconds, Self.stepCount)
      }
      if silent.isEmpty && reached.isEmpty && waiting.isEmpty { throw exhausted(name) }
      bounds.sleep(
        orReadable: inbox.event.descriptor.rawValue,
        until: waiting.isEmpty ? .never : Deadline(nanoseconds: next))
      try bounds.report(
        StoreProgress(
          phase: .locating, doneBytes: 0, totalBytes: 0, activeHolderCount: 0, holderCount: 0))
      for news in inbox.take() {
        switch news {
        case .reached(let holder):
          silent.remove(holder)
          reached.insert(holder)
          next = Clock.now() &+ Self.readNanoseconds
        case .read(let holder, let manifest):
          return Outcome(manifest: manifest, source: holder, silent: silent)
        case .failed(let holder, let error):
          silent.remove(holder)
          reached.remove(holder)
          // That is what can be mended.
          if error.code == .unsupported { code = .unsupported }
          failures.append("\(holder.segment) at \(holder.rpc): \(error.message)")
          if reached.isEmpty { next = 0 }
        }
      }
    }
  }

  private mutating func start(_ inbox: Inbox) {
    guard let record = waiting.popLast() else { return }
    let holder = record.holder
    silent.insert(holder)
    let completion: StoreService.Completion<Manifest> = { result in
      switch result {
      case .success(let manifest): inbox.put(.read(holder, manifest))
      case .failure(let error): inbox.put(.failed(holder, error))
      }
    }
    HolderConnection.fetchManifest(
      engine, workers, holder, version,
      until: min(bounds.deadline, .after(milliseconds: Self.askMilliseconds)),
      reached: { inbox.put(.reached(holder)) }, completion)
  }

  private func exhausted(_ name: String) -> EngineError {
    EngineError(
      code,
      "payload '\(name)': no live holder of version \(version); tried: "
        + failures.joined(separator: "; "))
  }
}
