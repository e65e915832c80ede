import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import Synchronization

/// Processes that publish, get and remove payloads, and others that watch, on one scripted service,
/// in one thread and in virtual time. The seed decides what they do, what fails, and who acts in
/// the middle of another's call.
final class RecordModel: @unchecked Sendable {
  // Unchecked: one thread.
  private final class VirtualClock: Sendable {
    let nanoseconds = Atomic<UInt64>(1_000_000_000_000)
    var now: UInt64 { nanoseconds.load(ordering: .relaxed) }
  }

  /// The failures that a client of the service can see.
  private class Client: @unchecked Sendable {
    var directory: StoreDirectory!
    var isCut = false
    var isBusy = false
  }

  private final class Holder: Client, @unchecked Sendable {
    var keeper: RecordKeeper!
    var held: [String: HolderRecord] = [:]
  }

  private final class Watcher: Client, @unchecked Sendable {
    var follower: PayloadFollower!
    var told: [String: PayloadVersion] = [:]
  }

  private var random: SwarmRandom
  private let clock = VirtualClock()
  private let service: ScriptedService
  private var holders: [Holder] = []
  private var watchers: [Watcher] = []
  private let observer = Client()
  private var depth = 0
  private var isHealed = false
  private var order = 0
  private var lossCount = 0
  private var lastVersion: UInt64 = 0
  /// When publishing each version of a name last began or ended.
  private var published: [String: [PayloadVersion: Int]] = [:]
  private struct Publication {
    let version: PayloadVersion
    let start: Int
    let time: UInt64
    var isDone = false
  }
  /// Attempts to publish: by process, the first of each version of a name, and the last of a name.
  private var attempts: [UInt64: Publication] = [:]
  private var firstAttempts: [String: [PayloadVersion: Publication]] = [:]
  private var lastAttempts: [String: Publication] = [:]
  /// When the last removal of a name ended, successful or not; `Int.max` while one is running.
  private var removalEnds: [String: Int] = [:]
  /// How far the clocks of the processes differ.
  private let skewMilliseconds: UInt64
  /// What a successful removal covers: everything published before it began.
  private var removed: [String: [PayloadVersion: Int]] = [:]
  /// Impossible reports to a watcher.
  private(set) var faults: [String] = []
  private(set) var stepCount = 0
  /// How many names had a known expected listing in the end.
  private(set) var expectedCount = 0
  /// Whether every event is printed.
  var isTraced = false

  private static let ttlMilliseconds: UInt64 = 3000
  private static let names = ["a", "b/c", "\u{E9}", "a b", "\u{301}x"]

  init(seed: UInt64) throws {
    random = SwarmRandom(seed: seed)
    skewMilliseconds = seed.isMultiple(of: 2) ? 0 : 4000
    let clock = clock
    service = ScriptedService { clock.now }
    connect(observer)
    for _ in 0..<4 { holders.append(try newHolder()) }
    for prefix in ["", "a", "b/"] {
      let watcher = Watcher()
      connect(watcher)
      let told: @Sendable (PayloadChange) -> Void = { [unowned self, unowned watcher] change in
        self.note(change, watcher)
      }
      watcher.follower = PayloadFollower(watcher.directory, prefix: prefix, tell: told)
      watchers.append(watcher)
    }
  }

  private func newHolder() throws -> Holder {
    let holder = Holder()
    connect(holder)
    holder.keeper = try RecordKeeper(holder.directory, hasThread: false)
    holder.keeper.onRemoval { [unowned self, unowned holder] record in
      trace("\(number(holder)) withdraws \(record.name) \(record.version.low)")
      checkWithdrawal(record)
      if holder.held[record.name]?.holder == record.holder { holder.held[record.name] = nil }
      holder.keeper.remove(record, Self.call)
    }
    return holder
  }

  private func connect(_ client: Client) {
    let clock = clock
    let store = ScriptedStore(
      service,
      pageLimit: { [unowned self] in chance(0.5) ? Int.random(in: 1...4, using: &random) : 500 },
      repeated: { [unowned self] in chance(0.1) ? UInt64.random(in: 1...5, using: &random) : 0 },
      before: { [unowned self, unowned client] in fate(of: client) })
    // The removal uses the clock that is ahead: see `publish`.
    let skew = skewMilliseconds
    client.directory = StoreDirectory(
      store, prefix: "mooncake/", ttlMilliseconds: Self.ttlMilliseconds, now: { clock.now },
      wallMilliseconds: { clock.now / 1_000_000 + skew })
  }

  /// Its deadline has passed, so nobody waits; nothing takes real time here.
  private static var call: Call { Call(until: Deadline(nanoseconds: 1)) }

  private func trace(_ text: @autoclosure () -> String) {
    if isTraced { print(clock.now / 1_000_000, String(repeating: " ", count: depth), text()) }
  }

  private func chance(_ share: Double) -> Bool { random.unit() < share }

  private func note(_ change: PayloadChange, _ watcher: Watcher) {
    switch change {
    case .appeared(let info):
      if watcher.told[info.name] != nil { faults.append("\(info.name) appeared twice") }
      watcher.told[info.name] = info.version
    case .changed(let info):
      if watcher.told[info.name] == nil || watcher.told[info.name] == info.version {
        faults.append("\(info.name) did not change")
      }
      watcher.told[info.name] = info.version
    case .vanished(let name):
      if watcher.told.removeValue(forKey: name) == nil { faults.append("\(name) vanished twice") }
    }
  }

  // MARK: What fails

  /// Asked before each call to the service.
  private func fate(of client: Client) -> ScriptedService.Fate {
    if isHealed { return .done }
    if depth < 2 && chance(0.08) {
      depth += 1
      act()
      depth -= 1
    }
    if chance(0.3) { advance(milliseconds: .random(in: 0...60, using: &random)) }
    if client.isCut || chance(0.01) { return .unreachable }
    return chance(0.01) ? .answerLost : .done
  }

  private func advance(milliseconds: UInt64) {
    clock.nanoseconds.wrappingAdd(milliseconds * 1_000_000, ordering: .relaxed)
  }

  // MARK: What happens

  func run(stepCount: Int) {
    for _ in 0..<stepCount { act() }
  }

  private func act() {
    stepCount += 1
    let name = Self.names.randomElement(using: &random)!
    switch Int.random(in: 0..<100, using: &random) {
    case 0..<22: use(holders) { try? _ = $0.keeper.step() }
    case 22..<40: use(watchers) { try? $0.follower.turn(Self.call) }
    case 40..<52: use(holders) { publish(name, $0) }
    case 52..<64: use(holders) { replicate(name, $0) }
    case 64..<72: use(holders) { withdraw(name, $0) }
    case 72..<78: use([observer]) { remove(name, $0) }
    case 78..<82: use([observer]) { check(try? $0.directory.list(prefix: "", Self.call)) }
    case 82..<88: advance(milliseconds: .random(in: 1...Self.ttlMilliseconds, using: &random))
    case 88..<92:
      let clients: [Client] = holders + watchers
      let client = clients.randomElement(using: &random)!
      client.isCut.toggle()
      trace("\((client as? Holder).map(number) ?? -1) cut: \(client.isCut)")
    case 92..<94: service.compact()
    case 94: use(holders) { crash($0) }
    case 95: if chance(0.2) { loseEverything() }
    case 96: if chance(0.3) { advance(milliseconds: .random(in: 20...80, using: &random) * 60_000) }
    case 97: plantGarbage(name)
    default:
      for holder in holders where !holder.isBusy { use([holder]) { try? _ = $0.keeper.step() } }
    }
  }

  private func number(_ holder: Holder) -> Int { holders.firstIndex { $0 === holder } ?? -1 }

  /// Lets one of these clients act, unless it is in the middle of something.
  private func use<One: Client>(_ clients: [One], _ body: (One) -> Void) {
    let client = clients.randomElement(using: &random)!
    if client.isBusy { return }
    client.isBusy = true
    body(client)
    client.isBusy = false
  }

  private func publish(_ name: String, _ holder: Holder) {
    let former = holder.held[name]
    if let former, !former.isOrigin { return }
    order += 1
    // Now and then the same bytes again.
    if chance(0.7) || lastVersion == 0 { lastVersion += 1 }
    let skew = skewMilliseconds == 0 ? 0 : UInt64.random(in: 0...skewMilliseconds, using: &random)
    advance(milliseconds: 5)
    let record = testRecord(
      name, version: lastVersion, holding: .random(in: 1 ... .max, using: &random),
      published: clock.now / 1_000_000 + skew)
    let version = record.version
    if version == former?.version { return }
    let formerOrder = published[name]?[version]
    published[name, default: [:]][version] = order
    let attempt = Publication(version: version, start: order, time: clock.now)
    attempts[record.holder.holding] = attempt
    if firstAttempts[name]?[version] == nil {
      firstAttempts[name, default: [:]][version] = attempt
    }
    lastAttempts[name] = attempt
    trace("\(number(holder)) publishes \(name) \(lastVersion)")
    do throws(MooncakeError) {
      try holder.keeper.publish(record, isCreateOnly: chance(0.2), Self.call)
    } catch {
      trace("\(number(holder)) failed to publish \(name) \(version.low): \(error.message)")
      // It only counts if its head was there for a while.
      if !service.hasPut(observer.directory.headKey(name), by: record.holder) {
        published[name]?[version] = formerOrder
      }
      return
    }
    trace("\(number(holder)) published \(name) \(version.low)")
    // A removal in between may have come first.
    order += 1
    published[name]?[version] = order
    if lastAttempts[name]?.start == attempt.start { lastAttempts[name]?.isDone = true }
    holder.held[name] = record
    if let former { holder.keeper.remove(former, Self.call) }
  }

  private func replicate(_ name: String, _ holder: Holder) {
    if var own = holder.held[name] {
      if own.isComplete { return }
      own.isComplete = true
      holder.held[name] = own
      return holder.keeper.put(own, Self.call)
    }
    guard let head = try? holder.directory.head(name, Self.call) else { return }
    var record = testRecord(
      name, holding: .random(in: 1 ... .max, using: &random), isOrigin: false, isComplete: false)
    record.summary = head.summary
    trace("\(number(holder)) gets \(name) \(head.version.low)")
    holder.held[name] = record
    holder.keeper.put(record, Self.call)
  }

  private func withdraw(_ name: String, _ holder: Holder) {
    if let record = holder.held.removeValue(forKey: name) {
      trace("\(number(holder)) ends \(name) \(record.version.low)")
      holder.keeper.remove(record, Self.call)
    }
  }

  private func remove(_ name: String, _ client: Client) {
    order += 1
    let (start, losses) = (order, lossCount)
    trace("removing \(name)")
    let formerEnd = removalEnds[name]
    removalEnds[name] = .max
    defer {
      order += 1
      removalEnds[name] = formerEnd == .max ? .max : order
    }
    guard (try? client.directory.remove(name, Self.call)) == true else { return }
    trace("removed \(name)")
    // A service that has since lost everything knows of no removal.
    if lossCount != losses { return }
    for (version, time) in published[name] ?? [:] where time < start {
      removed[name, default: [:]][version] = start
    }
  }

  private func crash(_ holder: Holder) {
    guard let index = holders.firstIndex(where: { $0 === holder }),
      let fresh = try? newHolder()
    else { return }
    trace("\(index) crashes")
    // What it has put stays until its lease ends.
    holders[index] = fresh
    graveyard.append(holder)
  }
  /// Running calls may still refer to them.
  private var graveyard: [Holder] = []

  private func loseEverything() {
    trace("everything is lost")
    service.loseEverything()
    lossCount += 1
    removed = [:]
  }

  private func plantGarbage(_ name: String) {
    trace("garbage \(name)")
    _ = service.put(
      MetadataEntry(key: observer.directory.headKey(name), value: "{"), nil, isOnlyIfAbsent: false)
  }

  private func check(_ infos: [PayloadInfo]?) {
    guard let infos else { return }
    if Set(infos.map(\.name)).count != infos.count { faults.append("a name is listed twice") }
  }

  /// Nothing may be withdrawn that nobody has removed since it was published, unless its holder was
  /// away for long.
  private func checkWithdrawal(_ record: HolderRecord) {
    guard
      let attempt = attempts[record.holder.holding]
        ?? firstAttempts[record.name]?[record.version],
      removalEnds[record.name] ?? 0 < attempt.start, !isLongAgo(attempt)
    else { return }
    faults.append("'\(record.name)': version \(record.version.low) was withdrawn unasked")
  }

  private func isLongAgo(_ attempt: Publication) -> Bool {
    clock.now - attempt.time >= StoreDirectory.removalMilliseconds * 1_000_000
  }

  // MARK: The end

  /// How a name must be listed, if that does not depend on races or clock differences: as its last
  /// publication, if a complete holder is left.
  private func expected(_ name: String) -> PayloadVersion? {
    guard skewMilliseconds == 0, let last = lastAttempts[name], last.isDone,
      removalEnds[name] ?? 0 < last.start, !isLongAgo(last)
    else { return nil }
    let isHeld = holders.contains {
      $0.held[name]?.version == last.version && $0.held[name]?.isComplete == true
    }
    return isHeld ? last.version : nil
  }

  /// Lets everything run for a few lease times and returns what is wrong then.
  func settle() throws -> [String] {
    isHealed = true
    for client in (holders as [Client]) + watchers { client.isCut = false }
    for _ in 0..<24 {
      advance(milliseconds: Self.ttlMilliseconds / 4)
      for holder in holders { _ = try holder.keeper.step() }
      for watcher in watchers { try watcher.follower.turn(Self.call) }
    }
    var wrong = faults
    for watcher in watchers {
      let listed = try observer.directory.list(prefix: watcher.follower.prefix, Self.call)
      let expected = Dictionary(uniqueKeysWithValues: listed.map { ($0.name, $0.version) })
      for name in Set(expected.keys).union(watcher.told.keys)
      where expected[name] != watcher.told[name].map(Optional.some) {
        wrong.append(
          "'\(name)': listed \(Self.text(expected[name] ?? nil)), told "
            + Self.text(watcher.told[name]))
      }
    }
    let infos = try observer.directory.list(prefix: "", Self.call)
    for name in Self.names {
      let version = infos.first { $0.name.utf8.elementsEqual(name.utf8) }?.version
      if let expected = expected(name) {
        expectedCount += 1
        if version != expected {
          wrong.append(
            "'\(name)': \(Self.text(expected)) is expected, listed \(Self.text(version))")
        }
      }
      let isHeld = holders.contains {
        $0.held[name]?.version == version && $0.held[name]?.isComplete == true
      }
      if version != nil && !isHeld { wrong.append("'\(name)': listed, but nobody holds it") }
    }
    for info in infos {
      if let version = info.version, let start = removed[info.name]?[version],
        published[info.name]?[version] ?? 0 < start
      {
        wrong.append("'\(info.name)': removed version \(version.low) came back")
      }
    }
    if isTraced {
      for entry in try observer.directory.store.listAll(prefix: "", Self.call).entries {
        trace("\(entry.key) \(entry.value)")
      }
    }
    return wrong
  }

  private static func text(_ version: PayloadVersion?) -> String {
    version.map { "version \($0.low)" } ?? "nothing"
  }
}
