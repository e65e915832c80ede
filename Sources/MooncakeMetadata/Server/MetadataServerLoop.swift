import CLinux
import CMicroHTTP
import Glibc
import MooncakeBase
import MooncakeSystem
import Synchronization

/// The thread of a metadata server. libmicrohttpd drives the connections; this class decides the
/// answers and when waiting requests continue. Each turn takes in requests, ends leases, makes the
/// journal safe and answers; requests that arrive meanwhile are left to the next turn, so that no
/// number of clients can hold up one of these steps.
final class MetadataServerLoop: @unchecked Sendable {
  // Unchecked: once the thread runs, only it uses anything but `isStopping` and the doorbell.
  private let library: MicroHTTPLibrary
  private let daemon: OpaquePointer
  private let epoll: Epoll
  private let doorbell: EventFD
  private let isStopping = Atomic(false)
  private var rules: MetadataRules
  /// Released when the server stops, so that another one can use the directory.
  private var journal: MetadataJournal?
  private let token: MetadataToken?
  private let clients: MetadataClients
  /// Requests suspended until something changes.
  private var watchers: [MetadataExchange] = []
  /// Requests suspended until the journal is safe.
  private var committing: [MetadataExchange] = []
  private var bodyBytes = 0
  /// Bytes of answers that clients have not taken yet.
  private var answerBytes = 0
  private var isDaemonStopped = false
  /// Whether suspended connections were resumed; they continue with the daemon's next run.
  private var hasResumed = false
  /// When requests were last taken in, on `Clock`.
  private var last = Clock.now()

  private static var stopping: MetadataExchange.Answer { .init(503, "the server is stopping\n") }
  private static var crowded: MetadataExchange.Answer {
    .init(503, "too many values are arriving at once: try again\n")
  }
  private static var unauthorized: MetadataExchange.Answer {
    .init(401, "unauthorized: this server asks for the token in \(MetadataToken.variable)\n")
  }
  /// Bytes of answers prepared before they are sent.
  private static let turnBytes = 16 << 20
  private static let memoryBytes = 16 << 10
  private static let tickMilliseconds: Int32 = 1000
  /// The most of a stall that counts against leases and clients.
  private static let stallNanoseconds: UInt64 = 500_000_000
  private static let roundsAfterStall = 16

  init(
    listener: consuming Socket, rules: MetadataRules, journal: MetadataJournal?,
    token: MetadataToken?
  ) throws(MooncakeError) {
    library = try MicroHTTPLibrary.shared()
    self.rules = rules
    self.journal = journal
    self.token = token
    do throws(Errno) {
      epoll = try Epoll()
      doorbell = try EventFD()
    } catch {
      throw MooncakeError(.system, "metadata server: \(error)")
    }
    FileDescriptor.fillStandard()
    let owner = Box()
    let connections = UInt32(rules.table.limits.connectionCount + MetadataClients.closingCount)
    let daemon = mhd_start(
      library.start, connections, Self.memoryBytes, 0,
      { context, connection, url, method, _, bytes, count, slot in
        guard let context, let connection, let url, let method, let count, let slot else {
          return MicroHTTPLibrary.no
        }
        let box = Unmanaged<Box>.fromOpaque(context).takeUnretainedValue()
        guard let loop = box.loop else { return MicroHTTPLibrary.no }
        return loop.handle(
          connection, String(cString: url), String(cString: method),
          UnsafeRawBufferPointer(start: bytes, count: count.pointee), count, slot)
      },
      { context, _, slot, _ in
        guard let context, let slot, let exchange = slot.pointee else { return }
        slot.pointee = nil
        let box = Unmanaged<Box>.fromOpaque(context).takeUnretainedValue()
        box.loop?.finish(Unmanaged<MetadataExchange>.fromOpaque(exchange).takeRetainedValue())
      },
      { context, connection, _, event in
        guard let context, let connection else { return }
        let box = Unmanaged<Box>.fromOpaque(context).takeUnretainedValue()
        box.loop?.clients.changed(
          connection, isStart: Int(event.rawValue) == mhd_connection_started)
      }, Unmanaged.passUnretained(owner).toOpaque())
    guard let daemon else {
      throw MooncakeError(.system, "metadata server: cannot start libmicrohttpd: \(Errno.current)")
    }
    self.daemon = daemon
    self.owner = owner
    clients = MetadataClients(library, daemon, listener: listener, limits: rules.table.limits)
    owner.loop = self
    clients.endWatch = { [unowned self] in endWatch($0) }
    do throws(Errno) {
      try epoll.add(
        mhd_epoll_descriptor(library.information, daemon), events: Epoll.readable, token: 0)
      try epoll.add(doorbell.descriptor.rawValue, events: Epoll.readable, token: 1)
      try clients.listen(epoll)
    } catch {
      throw MooncakeError(.system, "metadata server: \(error)")
    }
  }

  /// The context of the daemon's callbacks; it must exist before the loop does.
  private final class Box { weak var loop: MetadataServerLoop? }
  private let owner: Box

  func requestStop() {
    isStopping.store(true, ordering: .releasing)
    doorbell.signal()
  }

  // MARK: Thread

  func run() {
    let events = UnsafeMutableBufferPointer<epoll_event>.allocate(capacity: 8)
    defer { events.deallocate() }
    last = Clock.now()
    rules.startLeases(now: last)
    while !isStopping.load(ordering: .acquiring) {
      let pause = pause
      FileDescriptor.fillStandard()
      let start = Clock.now()
      let count = epoll.wait(into: events, timeoutMilliseconds: pause)
      let now = Clock.now()
      let isAfterStall = postponeAfterStall(now, waited: now &- start, pause)
      let events = events[..<count]
      // Before leases are ended: requests that arrived while the disk blocked the thread may be
      // renewals.
      if isAfterStall || events.contains(where: { $0.data.u64 == MetadataClients.listenerToken }) {
        var rounds = isAfterStall ? Self.roundsAfterStall : 1
        while clients.accept(epoll), rounds > 1 {
          runDaemon()
          rounds -= 1
        }
      }
      runDaemon()
      rules.expire(now: now)
      commit()
      serveWatchers(Clock.now())
      // With the time from before the commit: a client that spoke while the disk blocked the thread
      // is not silent.
      clients.tend(epoll, now: now)
    }
    commit()
    // The daemon must not be stopped with suspended connections.
    for exchange in watchers {
      exchange.answer = Self.stopping
      resume(exchange)
    }
    watchers = []
    runDaemon()
    stopDaemon()
    clients.stop()
    journal = nil
  }

  deinit { if !isDaemonStopped { stopDaemon() } }

  private func stopDaemon() {
    isDaemonStopped = true
    library.stop(daemon)
  }

  private func runDaemon() {
    hasResumed = false
    _ = library.run(daemon)
  }

  private func resume(_ exchange: MetadataExchange) {
    hasResumed = true
    library.resume(exchange.connection)
  }

  /// Milliseconds until there is something to do without a request.
  private var pause: Int32 {
    // Changes came in while the journal was written.
    if !rules.records.isEmpty { return 0 }
    // While there are leases or clients, sleep briefly: a long sleep would look like a stall.
    let isQuiet = rules.table.leases.isEmpty && clients.isEmpty
    var wait = isQuiet ? Int32.max : Self.tickMilliseconds
    var milliseconds: UInt64 = 0
    if library.timeout(daemon, &milliseconds) == MicroHTTPLibrary.yes {
      wait = min(wait, Int32(clamping: milliseconds))
    }
    var end = min(rules.table.nextExpiry, clients.nextTime)
    for exchange in watchers { end = min(end, exchange.watch?.end ?? .max) }
    wait = min(wait, Deadline(nanoseconds: end).remainingMilliseconds.magnitude32)
    return wait == .max ? -1 : wait
  }

  /// Extends leases and clients' time after a stall, when the process was stopped or the disk slow
  /// and no requests were taken. Part of the stall still counts, so that leases end even on the
  /// slowest disk. Returns whether there was a stall.
  private func postponeAfterStall(_ now: UInt64, waited: UInt64, _ pause: Int32) -> Bool {
    defer { last = now }
    if pause < 0 { return false }
    let stall = now &- last &- min(waited, UInt64(pause) &* 1_000_000)
    if stall <= Self.stallNanoseconds { return false }
    rules.table.postpone(nanoseconds: stall - Self.stallNanoseconds)
    clients.postpone(nanoseconds: stall - Self.stallNanoseconds)
    return true
  }

  /// Makes the journal safe, then answers the requests whose changes it holds.
  private func commit() {
    guard journal != nil else {
      rules.records = []
      return
    }
    for record in rules.records { journal?.append(record) }
    rules.records = []
    var isSafe = true
    do throws(Errno) {
      try journal?.commit { rules.snapshot }
    } catch {
      isSafe = false
      Log.error("metadata server: the journal cannot be written: \(error)")
      for exchange in committing {
        exchange.answer = MetadataExchange.Answer(
          507, "in memory only, a restart loses it: the journal cannot be written: \(error)\n")
      }
    }
    answerCommitted()
    if isSafe { compact() }
  }

  /// Answers the requests that wait for the journal, and takes in new ones.
  private func answerCommitted() {
    if committing.isEmpty { return }
    let exchanges = committing
    committing = []
    for exchange in exchanges { resume(exchange) }
    runDaemon()
  }

  /// Rewrites the journal if it is mostly outdated. Requests whose changes are safe have been
  /// answered before.
  private func compact() {
    guard journal?.isWorthRewriting(liveBytes: rules.table.usedBytes) == true else { return }
    do throws(Errno) {
      try journal?.rewrite(rules.snapshot)
    } catch {
      Log.warning("metadata server: the journal keeps growing: cannot rewrite it: \(error)")
      return
    }
    // Changes that came in just before are in the new file.
    rules.records = []
    answerCommitted()
  }

  private func serveWatchers(_ now: UInt64) {
    // Taken out first: the daemon's callbacks add to the list.
    let waiting = watchers
    watchers = []
    var answeredBytes = 0
    for exchange in waiting {
      guard let answer = rules.answer(toWatch: exchange, now: now) else {
        watchers.append(exchange)
        continue
      }
      exchange.answer = answer
      resume(exchange)
      answeredBytes += answer.body.count
      if answeredBytes < Self.turnBytes { continue }
      runDaemon()
      answeredBytes = 0
    }
    if hasResumed { runDaemon() }
  }

  /// Answers a wait for changes early because others need its place.
  private func endWatch(_ key: MetadataConnections.Key) -> Bool {
    let index = watchers.firstIndex { UInt(bitPattern: $0.connection) == key }
    guard let index else { return false }
    let exchange = watchers.remove(at: index)
    exchange.watch?.end = 0
    exchange.answer = rules.answer(toWatch: exchange, now: Clock.now())
    resume(exchange)
    runDaemon()
    return true
  }

  // MARK: Callbacks of libmicrohttpd, on the thread

  private func handle(
    _ connection: OpaquePointer, _ path: String, _ method: String, _ bytes: UnsafeRawBufferPointer,
    _ count: UnsafeMutablePointer<Int>, _ slot: UnsafeMutablePointer<UnsafeMutableRawPointer?>
  ) -> MHD_Result {
    // Its client will not get an answer and sends the request again on another connection.
    if clients.isClosing(connection) { return MicroHTTPLibrary.no }
    guard let known = slot.pointee else {
      let exchange = MetadataExchange(connection, method: method, path: path)
      if !isAuthorized(exchange) {
        exchange.isAuthorized = false
        exchange.answer = Self.unauthorized
      }
      slot.pointee = Unmanaged.passRetained(exchange).toOpaque()
      clients.enter(.body, connection)
      return MicroHTTPLibrary.yes
    }
    let exchange = Unmanaged<MetadataExchange>.fromOpaque(known).takeUnretainedValue()
    if !bytes.isEmpty {
      take(bytes, exchange)
      count.pointee = 0
      return MicroHTTPLibrary.yes
    }
    if let answer = exchange.answer { return send(answer, exchange) }
    if isStopping.load(ordering: .acquiring) { return send(Self.stopping, exchange) }
    clients.enter(.work, connection)
    let before = rules.records.count
    guard
      let answer = rules.answer(
        exchange, parameter: { self.parameter($0, connection) }, now: Clock.now())
    else {
      watchers.append(exchange)
      clients.enter(.watch, connection)
      library.suspend(connection)
      return MicroHTTPLibrary.yes
    }
    if journal != nil && rules.records.count > before {
      exchange.answer = answer
      committing.append(exchange)
      library.suspend(connection)
      return MicroHTTPLibrary.yes
    }
    return send(answer, exchange)
  }

  private func take(_ bytes: UnsafeRawBufferPointer, _ exchange: MetadataExchange) {
    if exchange.isTooLarge || exchange.answer != nil { return }
    let limits = rules.table.limits
    let limit = exchange.path == "/metadata/values" ? limits.questionBytes : limits.valueBytes
    let isTooLarge = exchange.body.count + bytes.count > limit
    let isCrowded = bodyBytes + bytes.count > limits.passingBytes
    if isTooLarge || isCrowded {
      let excess = bodyBytes + bytes.count - limits.passingBytes
      dropBody(exchange)
      exchange.isTooLarge = isTooLarge
      if isTooLarge { return }
      exchange.answer = Self.crowded
      clients.closeHeaviest(in: .body, neededBytes: excess)
      return
    }
    exchange.body.append(contentsOf: bytes)
    bodyBytes += bytes.count
    clients.hold(exchange.body.count, exchange.connection)
  }

  private func dropBody(_ exchange: MetadataExchange) {
    bodyBytes -= exchange.body.count
    exchange.body = []
    clients.hold(0, exchange.connection)
  }

  /// The health check needs no token.
  private func isAuthorized(_ exchange: MetadataExchange) -> Bool {
    guard let token, exchange.path != "/health" else { return true }
    var value: UnsafePointer<CChar>?
    var count = 0
    let name: StaticString = "Authorization"
    let isGiven =
      library.argument(
        exchange.connection, UInt32(mhd_header_kind),
        UnsafeRawPointer(name.utf8Start).assumingMemoryBound(to: CChar.self),
        name.utf8CodeUnitCount, &value, &count) == MicroHTTPLibrary.yes
    guard isGiven, let value else { return false }
    return token.isPresented(by: UnsafeRawBufferPointer(start: value, count: count))
  }

  private func finish(_ exchange: MetadataExchange) {
    dropBody(exchange)
    answerBytes -= exchange.sentBytes
    clients.finish(exchange.connection, isKnown: exchange.isUseful)
    watchers.removeAll { $0 === exchange }
    committing.removeAll { $0 === exchange }
  }

  private func parameter(
    _ name: String, _ connection: OpaquePointer
  ) -> MetadataRules.Parameter {
    var value: UnsafePointer<CChar>?
    var count = 0
    guard
      library.argument(
        connection, UInt32(mhd_argument_kind), name, name.utf8.count, &value, &count)
        == MicroHTTPLibrary.yes
    else { return .absent }
    guard let value else { return .text("") }
    let bytes = UnsafeRawBufferPointer(start: value, count: count)
    guard !bytes.contains(0), let text = String(validating: bytes, as: UTF8.self) else {
      return .malformed
    }
    return .text(text)
  }

  private func send(
    _ given: MetadataExchange.Answer, _ exchange: MetadataExchange
  ) -> MHD_Result {
    // Clients that send requests but do not read answers must not fill the memory.
    let excess = answerBytes + given.body.count - rules.table.limits.passingBytes
    let isTooMuch = excess > 0
    if isTooMuch { clients.closeHeaviest(in: .answer, neededBytes: excess) }
    let answer =
      isTooMuch ? MetadataExchange.Answer(503, "too many answers are waiting to be read\n") : given
    clients.enter(.answer, exchange.connection)
    exchange.answer = nil
    dropBody(exchange)
    exchange.sentBytes = answer.body.count
    answerBytes += exchange.sentBytes
    clients.hold(exchange.sentBytes, exchange.connection)
    var body = answer.body
    let response = body.withUnsafeMutableBytes {
      library.response($0.count, $0.baseAddress, UInt32(mhd_must_copy))
    }
    guard let response else { return MicroHTTPLibrary.no }
    defer { library.freeResponse(response) }
    let type = answer.isJSON ? "application/json" : "text/plain; charset=utf-8"
    _ = library.addHeader(response, "Content-Type", type)
    if answer.status == 401 { _ = library.addHeader(response, "WWW-Authenticate", "Bearer") }
    return library.queue(exchange.connection, answer.status, response)
  }
}

extension Int32 {
  /// -1, which means never, becomes the largest value.
  fileprivate var magnitude32: Int32 { self < 0 ? .max : self }
}
