import MooncakeEngine

/// Where a path leads and how it behaves.
final class FakePlace: @unchecked Sendable {
  // Unchecked: a simulation has one thread.
  enum Kind {
    /// Slices are sent and answered. It connects when it is needed, and a broken connection may
    /// leave writes behind that still land.
    case stream
    /// Slices are copied. A copy that is broken off lands no more.
    case memory
  }

  /// What may happen to a slice, in percent.
  struct Faults {
    var lost = 0
    var slow = 0
    var refused = 0
    var deadly = 0
    var failedConnects = 0
    /// Slices that a queue has no room for.
    var fullQueues = 0
    /// Connections that end without a fence; of those, the ones whose fence comes late or never.
    var unfenced = 0
    var lateFences = 0
    var missingFences = 0
  }

  let name: String
  let transport: String
  let kind: Kind
  let driver: FakeDriver
  var faults = Faults()
  var pieceBytes = Int.max
  var weight = 1
  /// Slices under way at once.
  var window = 4
  var latency: UInt64 = 20_000
  var cellNanoseconds: UInt64 = 2_000
  var connectNanoseconds: UInt64 = 50_000
  /// Whether it holds back writes while earlier ones may still land. If it does not, nothing lands
  /// late on it.
  var waitsForFences = true
  /// How long a broken connection still delivers what its reads have asked for.
  var drainNanoseconds: UInt64 = 0
  /// After so long without an answer a connection is given up.
  var answerLimit: UInt64 = 20_000_000
  /// Connects fail until then.
  var downUntil: UInt64 = 0
  /// Copies of so many bytes are made by the submitter.
  var inlineBytes = 2 * Cells.bytes
  /// With so many failures in a row, what is queued is given back.
  var connectLimit = 5
  /// Whether it ends writes that may still land and have failed too often, instead of keeping them
  /// until their fence or deadline.
  var failsExhausted = false

  init(_ name: String, transport: String, kind: Kind, driver: FakeDriver) {
    self.name = name
    self.transport = transport
    self.kind = kind
    self.driver = driver
  }

  /// The same way somewhere else.
  func moved() -> FakePlace {
    let other = FakePlace(name + "'", transport: transport, kind: kind, driver: driver)
    other.faults = faults
    other.pieceBytes = pieceBytes
    other.weight = weight
    other.window = window
    other.latency = latency
    other.cellNanoseconds = cellNanoseconds
    other.connectNanoseconds = connectNanoseconds
    other.waitsForFences = waitsForFences
    other.drainNanoseconds = drainNanoseconds
    other.answerLimit = answerLimit
    other.inlineBytes = inlineBytes
    other.connectLimit = connectLimit
    other.failsExhausted = failsExhausted
    return other
  }
}
