import Glibc
import MooncakeP2P
import MooncakeSystem
import Synchronization

/// Shows an operation's progress on stderr: a bar on a terminal, else a line each time.
final class ProgressDisplay: Sendable {
  private enum Form {
    case bar
    case lines
    case json
  }
  /// Data for computing the rate.
  private struct History {
    var phase: StoreProgress.Phase?
    var time: UInt64 = 0
    var bytes: UInt64 = 0
    /// Bytes per second, with more weight on the recent past.
    var rate = 0.0
    var isLineOpen = false
  }

  private let form: Form
  private let history = Lock(History())

  private init(_ form: Form) { self.form = form }

  deinit { end() }

  /// nil if nobody would see it.
  static func make(isForced: Bool, json: Bool) -> ProgressDisplay? {
    if isForced { return ProgressDisplay(json ? .json : .lines) }
    return isatty(STDERR_FILENO) == 1 ? ProgressDisplay(.bar) : nil
  }

  /// Shows a state.
  func show(_ state: StoreProgress) {
    let text = history.withLock { history in
      Self.update(&history, state)
      if form == .bar { history.isLineOpen = true }
      return form == .json ? json(state, history.rate) : line(state, history.rate)
    }
    form == .bar ? write("\r\u{1B}[K" + text) : write(text + "\n")
  }

  /// Leaves the bar as it is and starts a new line.
  func end() {
    let wasOpen = history.withLock { history in
      defer { history.isLineOpen = false }
      return history.isLineOpen
    }
    if wasOpen { write("\n") }
  }

  private static func update(_ history: inout History, _ state: StoreProgress) {
    let now = Clock.now()
    if history.phase != state.phase || state.doneBytes < history.bytes {
      history = History(
        phase: state.phase, time: now, bytes: state.doneBytes, isLineOpen: history.isLineOpen)
      return
    }
    let seconds = Double(now &- history.time) / 1e9
    if seconds < 0.001 { return }
    let rate = Double(state.doneBytes - history.bytes) / seconds
    history.rate = history.rate == 0 ? rate : history.rate * 0.7 + rate * 0.3
    history.time = now
    history.bytes = state.doneBytes
  }

  private func line(_ state: StoreProgress, _ rate: Double) -> String {
    var text = Self.name(state.phase)
    if state.totalBytes == 0 { return text }
    let part = Double(state.doneBytes) / Double(state.totalBytes)
    if form == .bar {
      let filled = Int(part * 20)
      text +=
        " [" + String(repeating: "#", count: filled)
        + String(repeating: ".", count: 20 - filled) + "]"
    }
    text += " \(decimal(part * 100, places: 0)) % of \(readableBytes(state.totalBytes))"
    if rate > 0 { text += ", \(readableBytes(UInt64(rate)))/s" }
    if state.phase == .transferring {
      text += ", \(state.activeHolderCount) of \(state.holderCount) holders"
    }
    if let left = Self.secondsLeft(state, rate) { text += ", \(decimal(left, places: 0)) s left" }
    return text
  }

  private func json(_ state: StoreProgress, _ rate: Double) -> String {
    var json = JSONObject()
    json.add("phase", Self.name(state.phase))
    json.add("done_bytes", state.doneBytes)
    json.add("total_bytes", state.totalBytes)
    json.add("bytes_per_second", rate, places: 0)
    json.add("active_holders", state.activeHolderCount)
    json.add("holders", state.holderCount)
    if let left = Self.secondsLeft(state, rate) { json.add("seconds_left", left, places: 1) }
    return json.text
  }

  private static func secondsLeft(_ state: StoreProgress, _ rate: Double) -> Double? {
    if rate < 1 || state.doneBytes > state.totalBytes { return nil }
    return Double(state.totalBytes - state.doneBytes) / rate
  }

  private static func name(_ phase: StoreProgress.Phase) -> String {
    switch phase {
    case .locating: "locating"
    case .hashing: "hashing"
    case .transferring: "transferring"
    case .publishing: "publishing"
    case .draining: "draining"
    }
  }

  private func write(_ text: String) {
    var text = text
    _ = text.withUTF8 { Glibc.write(STDERR_FILENO, $0.baseAddress, $0.count) }
  }
}
