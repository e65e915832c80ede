import MooncakeBase
import MooncakeEngine
import MooncakeSystem
import Synchronization

/// Reads the manifest of a version from any holder. One holder is asked first; while none answers,
/// more are asked soon, so that silent ones delay nobody.
struct ManifestSearch {
  /// The manifest, and what was learned about the holders.
  struct Outcome {
    var manifest: Manifest
    var source: HolderAddress
    /// Where the source keeps things, so that it need not be asked again.
    var sourceIndex: HolderConnection.Index
    /// Asked, and no answer so far.
    var silent: Set<HolderAddress>
  }

  private final class Inbox: Sendable {
    enum News: Sendable {
      case reached(HolderAddress)
      case progressed
      case read(HolderAddress, Manifest, HolderConnection.Index)
      case failed(HolderAddress, MooncakeError)
    }
    private let news = Lock<[News]>([])
    private let closed = Atomic(false)
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

    /// The search has ended.
    func close() { closed.store(true, ordering: .releasing) }
    var isClosed: Bool { closed.load(ordering: .acquiring) }
  }

  private let engine: TransferEngine
  private let workers: WorkerPool
  private let version: PayloadVersion
  private let bounds: Bounds
  private var waiting: [HolderRecord]
  private var silent: Set<HolderAddress> = []
  /// Have said where the manifest is; it is being read from them.
  private var reached: Set<HolderAddress> = []
  private var failures: [String] = []
  private var code = MooncakeError.Code.noHolder
  /// When holders were asked last; 0 to ask some at once.
  private var lastStart: UInt64 = 0
  /// When the latest bytes of a manifest arrived, or a holder said where they are.
  private var lastProgress: UInt64 = 0

  private static let askMilliseconds: UInt64 = 2000
  private static let stepNanoseconds: UInt64 = 50_000_000
  /// How long a manifest of which nothing comes is waited for before others are asked too, and how
  /// long one whose bytes come: each further read makes all of them slower.
  private static let readNanoseconds: UInt64 = 1_000_000_000
  private static let patienceNanoseconds: UInt64 = 10_000_000_000
  /// Holders that are asked at a time after the first one.
  private static let stepHolders = 4
  private static let phase = "fetching the manifest"

  init(
    _ engine: TransferEngine, _ workers: WorkerPool, _ holders: [HolderRecord],
    _ version: PayloadVersion, _ bounds: Bounds
  ) {
    self.engine = engine
    self.workers = workers
    self.version = version
    self.bounds = bounds
    // Each receiver begins with a different holder; the origin, which all know, comes last.
    waiting = holders.shuffled().sorted { $0.isOrigin && !$1.isOrigin }
  }

  /// `name` is the payload's, for messages.
  mutating func run(_ name: String) throws(MooncakeError) -> Outcome {
    let inbox: Inbox
    do throws(Errno) { inbox = try Inbox() } catch {
      throw MooncakeError(.system, "making an event descriptor: \(error)")
    }
    defer { inbox.close() }
    var count = 1
    while true {
      try bounds.check(Self.phase)
      let now = Clock.now()
      if now >= nextStart && !waiting.isEmpty {
        let isProgressing = !reached.isEmpty && now &- lastProgress < Self.readNanoseconds
        for _ in 0..<(isProgressing ? 1 : count) { start(inbox) }
        (lastStart, count) = (now, Self.stepHolders)
      }
      if silent.isEmpty && reached.isEmpty && waiting.isEmpty { throw exhausted(name) }
      bounds.sleep(
        orReadable: inbox.event.descriptor.rawValue,
        until: waiting.isEmpty ? .never : Deadline(nanoseconds: nextStart))
      try bounds.report(.locating, StoreProgress(.locating))
      for news in inbox.take() {
        switch news {
        case .reached(let holder):
          silent.remove(holder)
          reached.insert(holder)
          lastProgress = Clock.now()
        case .progressed: lastProgress = Clock.now()
        case .read(let holder, let manifest, let index):
          return Outcome(
            manifest: manifest, source: holder, sourceIndex: index, silent: silent)
        case .failed(let holder, let error):
          silent.remove(holder)
          reached.remove(holder)
          // This is the failure that the caller can do something about.
          if error.code == .unsupported { code = .unsupported }
          failures.append("\(holder.segment) at \(holder.rpc): \(error.message)")
          if reached.isEmpty { lastStart = 0 }
        }
      }
    }
  }

  private var nextStart: UInt64 {
    if lastStart == 0 { return 0 }
    let step = lastStart &+ Self.stepNanoseconds
    if reached.isEmpty { return step }
    return max(
      step,
      min(lastProgress &+ Self.readNanoseconds, lastStart &+ Self.patienceNanoseconds))
  }

  private mutating func start(_ inbox: Inbox) {
    guard let record = waiting.popLast() else { return }
    let holder = record.holder
    silent.insert(holder)
    let completion: StoreService.Completion<(Manifest, HolderConnection.Index)> = { result in
      switch result {
      case .success(let (manifest, index)): inbox.put(.read(holder, manifest, index))
      case .failure(let error): inbox.put(.failed(holder, error))
      }
    }
    var recipient = HolderConnection.Recipient(isWaiting: { !inbox.isClosed })
    recipient.reached = { inbox.put(.reached(holder)) }
    recipient.progressed = { inbox.put(.progressed) }
    HolderConnection.fetchManifest(
      engine, workers, record,
      until: min(bounds.deadline, .after(milliseconds: Self.askMilliseconds)), for: recipient,
      completion)
  }

  private func exhausted(_ name: String) -> MooncakeError {
    MooncakeError(
      code,
      "payload '\(name)': no live holder of version \(version); tried: "
        + failures.joined(separator: "; "))
  }
}
